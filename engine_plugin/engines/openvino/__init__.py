"""OpenVINO as an engine: the OpenVINO Model Server where it is installed, else an embedded server on OpenVINO GenAI.

Everything that is OpenVINO's own is in this package.
"""
