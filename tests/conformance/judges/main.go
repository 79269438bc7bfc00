// Command judges is gRPC's interop client and server on grpc-go, for the tests of this folder.
//
//	judges client TARGET CASE   run one case; exits with 0 when it passes, and logs why it does not
//	judges server ADDRESS       serve TestService until standard input ends; prints the address
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/interop"
	pb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
)

const limit = 60 * time.Second

// cases are those of grpc-go's interop client that need no credentials of Google's and no metadata from handlers.
var cases = map[string]func(context.Context, pb.TestServiceClient, ...grpc.CallOption){
	"empty_unary":                 interop.DoEmptyUnaryCall,
	"large_unary":                 interop.DoLargeUnaryCall,
	"client_streaming":            interop.DoClientStreaming,
	"server_streaming":            interop.DoServerStreaming,
	"ping_pong":                   interop.DoPingPong,
	"empty_stream":                interop.DoEmptyStream,
	"timeout_on_sleeping_server":  interop.DoTimeoutOnSleepingServer,
	"cancel_after_begin":          interop.DoCancelAfterBegin,
	"cancel_after_first_response": interop.DoCancelAfterFirstResponse,
	"status_code_and_message":     interop.DoStatusCodeAndMessage,
	"special_status_message":      interop.DoSpecialStatusMessage,
}

func main() {
	log.SetFlags(0)
	age := flag.Duration("age", 0, "how old a connection may become")
	ping := flag.Duration("ping", 0, "how often an idle client is pinged")
	streams := flag.Uint("streams", 0, "how many streams a connection may have")
	zip := flag.Bool("gzip", false, "compress: all answers of the server, all requests of the client")
	authority := flag.String("authority", "", "the :authority that the client sends")
	header := flag.Int("header", 0, "bytes of metadata that the client sends beside each request")
	flag.Parse()
	switch flag.Arg(0) {
	case "client":
		client(flag.Arg(1), flag.Arg(2), *zip, *authority, *header)
	case "server":
		options := []grpc.ServerOption{
			grpc.MaxRecvMsgSize(1 << 30),
			grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionAge: *age, Time: *ping, Timeout: time.Second}),
		}
		if *streams > 0 {
			options = append(options, grpc.MaxConcurrentStreams(uint32(*streams)))
		}
		if *zip {
			options = append(options, grpc.UnaryInterceptor(zipped), grpc.StreamInterceptor(zippedStream))
		}
		serve(flag.Arg(1), options)
	default:
		log.Fatal("neither client nor server")
	}
}

func client(target, name string, zip bool, authority string, header int) {
	options := []grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials())}
	if authority != "" {
		options = append(options, grpc.WithAuthority(authority))
	}
	var call []grpc.CallOption
	if zip {
		call = append(call, grpc.UseCompressor(gzip.Name))
	}
	connection, err := grpc.NewClient(target, options...)
	if err != nil {
		log.Fatal(err)
	}
	defer connection.Close()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	if header > 0 {
		ctx = metadata.AppendToOutgoingContext(ctx, "x-text", strings.Repeat("m", header), "x-bytes-bin", "\x00\xff\n")
	}
	service := pb.NewTestServiceClient(connection)
	switch run := cases[name]; {
	case run != nil:
		run(ctx, service, call...)
	case name == "pick_first_unary":
		interop.DoPickFirstUnary(ctx, service)
	case name == "unimplemented_method":
		interop.DoUnimplementedMethod(ctx, connection)
	case name == "unimplemented_service":
		interop.DoUnimplementedService(ctx, pb.NewUnimplementedServiceClient(connection))
	case name == "list":
		names := []string{"pick_first_unary", "unimplemented_method", "unimplemented_service"}
		for each := range cases {
			names = append(names, each)
		}
		slices.Sort(names)
		fmt.Println(strings.Join(names, "\n"))
	default:
		log.Fatalf("no case is called %q", name)
	}
}

func serve(address string, options []grpc.ServerOption) {
	network := "tcp"
	if path, isPath := strings.CutPrefix(address, "unix:"); isPath {
		network, address = "unix", path
	}
	listener, err := net.Listen(network, address)
	if err != nil {
		log.Fatal(err)
	}
	server := grpc.NewServer(options...)
	pb.RegisterTestServiceServer(server, interop.NewTestServer())
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		server.Stop()
	}()
	fmt.Println(listener.Addr())
	if err := server.Serve(listener); err != nil {
		log.Fatal(err)
	}
}

func zipped(ctx context.Context, request any, _ *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (any, error) {
	if err := grpc.SetSendCompressor(ctx, gzip.Name); err != nil {
		return nil, err
	}
	return handle(ctx, request)
}

func zippedStream(service any, stream grpc.ServerStream, _ *grpc.StreamServerInfo, handle grpc.StreamHandler) error {
	if err := grpc.SetSendCompressor(stream.Context(), gzip.Name); err != nil {
		return err
	}
	return handle(service, stream)
}
