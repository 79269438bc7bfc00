package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"engineplugin.invalid/conformance/protocol"
	"google.golang.org/grpc/codes"
)

func (s *session) services(r *report) {
	r.check("chat", func() (string, error) { return s.chat(16) })
	r.check("generate", s.generate)
	r.check("embed", s.embed)
	r.check("rerank", s.rerank)
	r.check("chat stream", s.chatStream)
	r.check("bidi refused", s.bidi)
	r.check("cancelled streams", s.cancelStreams)
	r.check("a call right after the abandoned one", s.quickly)
	r.check("the host's deadline", s.hostDeadline)
	r.check("a call right after the abandoned one", s.quickly)
}

func chatRequest(tokens int) object {
	return object{
		"model":      chatModel,
		"messages":   []object{{"role": "user", "content": "Tell me a story."}},
		"max_tokens": tokens,
		"ignore_eos": tokens == longAnswer,
		// The same words each time: of those by chance there may be none.
		"temperature": 0,
	}
}

func (s *session) invoke(ctx context.Context, service string, request object) ([]byte, error) {
	answer, err := s.rpc.InvokeService(ctx, &protocol.InvokeServiceRequest{ServiceName: service, RequestData: encode(request)})
	if err != nil {
		return nil, err
	}
	return answer.GetResponseData(), success(answer)
}

// completion calls chat or generate and returns the one choice's text.
func (s *session) completion(service string, request object) (string, error) {
	ctx, cancel := bounded()
	defer cancel()
	data, err := s.invoke(ctx, service, request)
	if err != nil {
		return "", err
	}
	answer, err := decode[completionJSON](data)
	if err != nil {
		return "", err
	}
	if len(answer.Choices) != 1 || answer.Choices[0].FinishReason == nil || answer.Usage == nil {
		return "", fmt.Errorf("no choice, finish_reason or usage in %s", clip(string(data)))
	}
	text := answer.Choices[0].Message.Content + answer.Choices[0].Text
	if text == "" || answer.Usage.CompletionTokens == 0 {
		return "", fmt.Errorf("no text in %s", clip(string(data)))
	}
	return fmt.Sprintf("%d tokens, %s", answer.Usage.CompletionTokens, answer.Object), nil
}

func (s *session) chat(tokens int) (string, error) {
	return s.completion("chat", chatRequest(tokens))
}

func (s *session) generate() (string, error) {
	return s.completion("generate", object{"model": chatModel, "prompt": "Once upon a time", "max_tokens": 16})
}

func (s *session) embed() (string, error) {
	ctx, cancel := bounded()
	defer cancel()
	data, err := s.invoke(ctx, "embed", object{"model": embedModel, "input": []string{"one", "two"}})
	if err != nil {
		return "", err
	}
	answer, err := decode[embeddingsJSON](data)
	if err != nil {
		return "", err
	}
	if len(answer.Data) != 2 || len(answer.Data[0].Embedding) == 0 || answer.Data[1].Index != 1 {
		return "", fmt.Errorf("not two embeddings: %s", clip(string(data)))
	}
	return fmt.Sprintf("2 of %d numbers", len(answer.Data[0].Embedding)), nil
}

func (s *session) rerank() (string, error) {
	ctx, cancel := bounded()
	defer cancel()
	request := object{"model": rerankModel, "query": "a cat", "documents": []string{"dog", "cat", "fish"}, "top_n": 2}
	data, err := s.invoke(ctx, "rerank", request)
	if err != nil {
		return "", err
	}
	answer, err := decode[rerankJSON](data)
	if err != nil {
		return "", err
	}
	if len(answer.Results) != 2 {
		return "", fmt.Errorf("%d results, not 2: %s", len(answer.Results), clip(string(data)))
	}
	for _, result := range answer.Results {
		if result.Index < 0 || result.Index > 2 || result.RelevanceScore == nil {
			return "", fmt.Errorf("a wrong result: %s", clip(string(data)))
		}
	}
	return "top 2 of 3", nil
}

func (s *session) openStream(ctx context.Context, tokens int) (protocol.ProviderService_InvokeServiceStreamClient, error) {
	request := chatRequest(tokens)
	request["stream"] = true
	return s.rpc.InvokeServiceStream(ctx, &protocol.InvokeServiceRequest{ServiceName: "chat", RequestData: encode(request)})
}

// chatStream reads a whole stream and looks at it as an HTTP client of AOG would see it: one text/event-stream body.
func (s *session) chatStream() (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), streamLimit)
	defer cancel()
	stream, err := s.openStream(ctx, 64)
	if err != nil {
		return "", err
	}
	var body bytes.Buffer
	chunks, final := 0, false
	err = each(stream, func(message *protocol.InvokeServiceStreamResponse) error {
		if final {
			return errors.New("a message after is_final")
		}
		body.Write(message.GetChunkData())
		chunks, final = chunks+1, message.GetIsFinal()
		return nil
	})
	if err != nil {
		return "", err
	}
	if !final {
		return "", fmt.Errorf("no is_final in %d chunks", chunks)
	}
	events, err := chatEvents(body.String())
	return fmt.Sprintf("%d events in %d chunks, data: [DONE], is_final", events, chunks), err
}

// chatEvents counts the events of a body and sees that they are whole and end with [DONE].
func chatEvents(body string) (int, error) {
	if !strings.HasSuffix(body, "data: [DONE]\n\n") {
		return 0, fmt.Errorf("no data: [DONE] at the end of %q", clip(body))
	}
	events := strings.Split(strings.TrimSuffix(body, "\n\n"), "\n\n")
	text := ""
	for _, event := range events[:len(events)-1] {
		if strings.HasPrefix(event, ":") {
			continue // a comment, as pings are
		}
		data, found := strings.CutPrefix(event, "data: ")
		if !found {
			return 0, fmt.Errorf("not an event: %q", clip(event))
		}
		chunk, err := decode[completionJSON]([]byte(data))
		if err != nil {
			return 0, err
		}
		for _, choice := range chunk.Choices {
			text += choice.Delta.Content
		}
	}
	if text == "" || len(events) < 4 {
		return 0, fmt.Errorf("%d events without text", len(events))
	}
	return len(events), nil
}

// bidi opens a conversation with a service that has none: an error code, then a clean end.
func (s *session) bidi() (string, error) {
	ctx, cancel := unbounded()
	defer cancel()
	stream, err := s.rpc.InvokeServiceBidi(ctx)
	if err != nil {
		return "", err
	}
	first := &protocol.InvokeServiceBidiRequest{ServiceName: "chat", Data: []byte("{}"), MessageType: "text", IsFirst: true}
	if err := stream.Send(first); err != nil {
		return "", err
	}
	if err := stream.CloseSend(); err != nil {
		return "", err
	}
	answer, err := stream.Recv()
	if err != nil {
		return "", err
	}
	if success(answer) == nil {
		return "", errors.New("chat has no conversation, yet it answered with success")
	}
	if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
		return "", fmt.Errorf("no clean end: %w", err)
	}
	return success(answer).Error(), nil
}

// cancelStreams abandons far more streams than the engine runs at once: were its work on them not stopped, the next
// call would have to wait for all of it.
func (s *session) cancelStreams() (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), streamLimit)
	defer cancel()
	streams := make([]protocol.ProviderService_InvokeServiceStreamClient, abandoned)
	for i := range streams {
		var err error
		if streams[i], err = s.openStream(ctx, longAnswer); err != nil {
			return "", err
		}
	}
	first, err := streams[0].Recv()
	if err != nil {
		return "", err
	}
	if err := success(first); err != nil {
		return "", err
	}
	cancel()
	for _, stream := range streams {
		for err = nil; err == nil; {
			_, err = stream.Recv()
		}
		if err := statusIs(err, codes.Canceled); err != nil {
			return "", err
		}
	}
	return fmt.Sprintf("%d times Canceled", abandoned), nil
}

// quickly sees that nothing of the abandoned calls stands in the way of the next one.
func (s *session) quickly() (string, error) {
	return quick(func() (string, error) { return s.chat(8) })
}

// quick sees that a call does not take long.
func quick(call func() (string, error)) (string, error) {
	began := time.Now()
	detail, err := call()
	if elapsed := time.Since(began); err == nil && elapsed > soon {
		err = fmt.Errorf("took %s", elapsed)
	}
	return detail, err
}

// hostDeadline does as cancelStreams does, with unary calls whose time runs out.
func (s *session) hostDeadline() (string, error) {
	const allowed = 150 * time.Millisecond
	ctx, cancel := context.WithTimeout(context.Background(), allowed)
	defer cancel()
	began := time.Now()
	ended := make(chan error, abandoned)
	for range abandoned {
		go func() {
			_, err := s.invoke(ctx, "chat", chatRequest(longAnswer))
			ended <- statusIs(err, codes.DeadlineExceeded)
		}()
	}
	for range abandoned {
		if err := <-ended; err != nil {
			return "", err
		}
	}
	return fmt.Sprintf("%d times DeadlineExceeded after %s", abandoned, time.Since(began).Round(time.Millisecond)), nil
}
