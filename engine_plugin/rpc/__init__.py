"""gRPC over HTTP/2 without grpcio, for both sides.

choice     native or grpcio
http2      connections and their streams over asyncio, on the core `ngh2`
frames     what the core overlooks in a client's frames
authority  what it would refuse in those of grpcio
memory     a connection within the process
status     gRPC's statuses
wire       messages, timeouts, statuses and metadata as gRPC writes them
"""
