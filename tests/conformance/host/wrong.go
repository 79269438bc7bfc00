package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	"engineplugin.invalid/conformance/protocol"
)

// A wrongCall is an invocation and the code that its answer must have.
type wrongCall struct {
	name    string
	service string
	data    []byte
	code    int32
}

// wrongCalls sees that what cannot be done is an OK answer whose code and message say why.
func wrongCalls(r *report) {
	s := spawn(nil)
	defer s.client.Kill()
	if !s.begin(r) {
		return
	}
	request := encode(chatRequest(8))
	s.wrong(r, []wrongCall{
		{"unknown service", "no-such-service", request, 404},
		{"malformed JSON", "chat", []byte(`{"messages": [`), 400},
		{"not an object", "chat", []byte(`[]`), 400},
		{"empty request", "chat", nil, 400},
		{"no messages", "chat", encode(object{"model": chatModel}), 400},
		{"engine not running", "chat", request, 503},
	})
	r.check("StartEngine in an unknown mode", func() (string, error) {
		ctx, cancel := unbounded()
		defer cancel()
		request := &protocol.StartEngineRequest{Mode: "no-such-mode"}
		return refused(func() (coded, error) { return s.rpc.StartEngine(ctx, request) }, 400)
	})
	simple(r, "StartEngine", unbounded, func(ctx context.Context) (coded, error) {
		return s.rpc.StartEngine(ctx, &protocol.StartEngineRequest{Mode: "cpu"})
	})
	unknown := chatRequest(8)
	unknown["model"] = "no-such-model"
	s.wrong(r, []wrongCall{{"unknown model", "chat", encode(unknown), 404}})
	s.wrongModels(r)
	r.check("a request of 6 MiB", s.largeRequest)
	r.check("Kill", s.kill)
	r.check("no error in the host's log", s.noErrors)
}

// wrong makes each call as a unary and as a streamed one.
func (s *session) wrong(r *report, calls []wrongCall) {
	for _, call := range calls {
		request := &protocol.InvokeServiceRequest{ServiceName: call.service, RequestData: call.data}
		r.check(call.name, func() (string, error) {
			ctx, cancel := bounded()
			defer cancel()
			return refused(func() (coded, error) { return s.rpc.InvokeService(ctx, request) }, call.code)
		})
		r.check(call.name+", streamed", func() (string, error) {
			ctx, cancel := bounded()
			defer cancel()
			return s.wrongStream(ctx, request, call.code)
		})
	}
}

func (s *session) wrongStream(ctx context.Context, request *protocol.InvokeServiceRequest, code int32) (string, error) {
	stream, err := s.rpc.InvokeServiceStream(ctx, request)
	if err != nil {
		return "", err
	}
	detail, err := refused(func() (coded, error) { return stream.Recv() }, code)
	if err != nil {
		return "", err
	}
	if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
		return "", fmt.Errorf("no clean end after the error: %v", err)
	}
	return detail, nil
}

func (s *session) wrongModels(r *report) {
	ctx, cancel := bounded()
	defer cancel()
	named := encode(object{"model": "no-such-model"})
	empty := encode(object{})
	for _, each := range []struct {
		name string
		code int32
		call func() (coded, error)
	}{
		{"LoadModel of an unknown one", 404, func() (coded, error) {
			return s.rpc.LoadModel(ctx, &protocol.LoadModelRequest{RequestJson: named})
		}},
		{"DeleteModel of an unknown one", 404, func() (coded, error) {
			return s.rpc.DeleteModel(ctx, &protocol.DeleteModelRequest{RequestJson: named})
		}},
		{"PullModel of an unknown one", 404, func() (coded, error) {
			return s.rpc.PullModel(ctx, &protocol.PullModelRequest{RequestJson: named})
		}},
		{"PullModel of nothing", 400, func() (coded, error) {
			return s.rpc.PullModel(ctx, &protocol.PullModelRequest{RequestJson: empty})
		}},
		{"LoadModel with malformed JSON", 400, func() (coded, error) {
			return s.rpc.LoadModel(ctx, &protocol.LoadModelRequest{RequestJson: []byte("{")})
		}},
	} {
		r.check(each.name, func() (string, error) { return refused(each.call, each.code) })
	}
}

// largeRequest sees that gRPC's default limit of 4 MiB is lifted: the plugin itself answers.
func (s *session) largeRequest() (string, error) {
	ctx, cancel := bounded()
	defer cancel()
	data := append([]byte(`{"messages": "`), bytes.Repeat([]byte("x"), 6<<20)...)
	request := &protocol.InvokeServiceRequest{ServiceName: "chat", RequestData: append(data, `"}`...)}
	return refused(func() (coded, error) { return s.rpc.InvokeService(ctx, request) }, 400)
}
