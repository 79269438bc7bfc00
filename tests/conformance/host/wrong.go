package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"engineplugin.invalid/conformance/protocol"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
)

// A wrongCall is an invocation, and the code and the error's id that its answer must have.
type wrongCall struct {
	name    string
	service string
	data    []byte
	code    int32
	id      string
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
		{"unknown service", "no-such-service", request, 404, "service-missing"},
		{"malformed JSON", "chat", []byte(`{"messages": [`), 400, "request-invalid"},
		{"not an object", "chat", []byte(`[]`), 400, "request-invalid"},
		{"empty request", "chat", nil, 400, "request-invalid"},
		{"no messages", "chat", encode(object{"model": chatModel}), 400, "request-invalid"},
		{"engine not running", "chat", request, 503, "engine-not-running"},
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
	s.wrong(r, []wrongCall{{"unknown model", "chat", encode(unknown), 404, "model-missing"}})
	s.wrongModels(r)
	r.check("a request of 6 MiB", s.largeRequest)
	r.check("Kill", s.kill)
	r.check("no error in the host's log", s.noErrors)
}

// wrong makes each call as a unary and as a streamed one.
func (s *session) wrong(r *report, calls []wrongCall) {
	for _, call := range calls {
		r.check(call.name, func() (string, error) { return s.wrongInvocation(call) })
		r.check(call.name+", streamed", func() (string, error) { return s.wrongStream(call) })
	}
}

func (call wrongCall) request() *protocol.InvokeServiceRequest {
	return &protocol.InvokeServiceRequest{ServiceName: call.service, RequestData: call.data}
}

func (s *session) wrongInvocation(call wrongCall) (string, error) {
	ctx, cancel := bounded()
	defer cancel()
	var trailer metadata.MD
	detail, err := refused(func() (coded, error) {
		return s.rpc.InvokeService(ctx, call.request(), grpc.Trailer(&trailer))
	}, call.code)
	if err != nil {
		return "", err
	}
	return detail, identified(trailer, call.id)
}

func (s *session) wrongStream(call wrongCall) (string, error) {
	ctx, cancel := bounded()
	defer cancel()
	stream, err := s.rpc.InvokeServiceStream(ctx, call.request())
	if err != nil {
		return "", err
	}
	var last *protocol.InvokeServiceStreamResponse
	detail, err := refused(func() (_ coded, err error) {
		last, err = stream.Recv()
		return last, err
	}, call.code)
	if err != nil {
		return "", err
	}
	if found := last.GetMetadata()[errorID]; found != call.id {
		return "", fmt.Errorf("the last message has the id %q, not %q", found, call.id)
	}
	if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
		return "", fmt.Errorf("no clean end after the error: %v", err)
	}
	return detail, identified(stream.Trailer(), call.id)
}

const errorID, errorFields = "error-id", "error-fields"

// identified sees that a call's trailing metadata has this id, and fields that name the engine.
func identified(trailer metadata.MD, id string) error {
	if found := trailer.Get(errorID); len(found) != 1 || found[0] != id {
		return fmt.Errorf("%s is %q, not %q", errorID, found, id)
	}
	fields := trailer.Get(errorFields)
	if len(fields) != 1 {
		return fmt.Errorf("%s is %q", errorFields, fields)
	}
	about := map[string]any{}
	if err := json.Unmarshal([]byte(fields[0]), &about); err != nil {
		return fmt.Errorf("%s: %w", errorFields, err)
	}
	if about["engine"] == "" || about["engine"] == nil {
		return fmt.Errorf("%s names no engine: %s", errorFields, fields[0])
	}
	return nil
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
