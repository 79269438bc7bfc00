package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"engineplugin.invalid/conformance/protocol"
)

// A speaker is a session whose services may each be asked in another flavour: as AOG does, it takes the flavour from a
// service's config_ref. What it writes and reads are the fields of AOG's templates for it.
type speaker struct {
	*session
	flavours map[string]string // by service
}

// The whole answer in Ollama's own JSON, or one object of its stream.
type nativeJSON struct {
	Model     string     `json:"model"`
	CreatedAt *time.Time `json:"created_at"`
	Message   *struct {
		Role      string `json:"role"`
		Content   string `json:"content"`
		Thinking  string `json:"thinking"`
		ToolCalls []struct {
			Function struct {
				Name      string         `json:"name"`
				Arguments map[string]any `json:"arguments"`
			} `json:"function"`
		} `json:"tool_calls"`
	} `json:"message"`
	Response   *string     `json:"response"`
	Done       *bool       `json:"done"`
	DoneReason string      `json:"done_reason"`
	EvalCount  int         `json:"eval_count"`
	Embeddings [][]float64 `json:"embeddings"`
}

// The same in OpenAI's.
type openaiJSON struct {
	ID      string `json:"id"`
	Model   string `json:"model"`
	Created int64  `json:"created"`
	Choices []struct {
		Message      openaiMessageJSON `json:"message"`
		Delta        openaiMessageJSON `json:"delta"`
		Text         string            `json:"text"`
		FinishReason string            `json:"finish_reason"`
	} `json:"choices"`
}

type openaiMessageJSON struct {
	Content          string `json:"content"`
	ReasoningContent string `json:"reasoning_content"`
	ToolCalls        []struct {
		Function struct {
			Name      string `json:"name"`
			Arguments string `json:"arguments"`
		} `json:"function"`
	} `json:"tool_calls"`
}

// said is what AOG makes of either.
type said struct {
	text, thought, call string
	finished            bool
	reason              string
}

func (s *speaker) native(service string) bool {
	return s.flavours[service] == "ollama"
}

// ask makes a request for chat or generate; a `tools` is passed on as it is.
func (s *speaker) ask(service, model, prompt string, tokens int, tools []object) object {
	request := object{"model": model}
	if service == "chat" {
		request["messages"] = []object{{"role": "user", "content": prompt}}
	} else {
		request["prompt"] = prompt
	}
	if tools != nil {
		request["tools"] = tools
	}
	if s.native(service) {
		request["keep_alive"] = "5m"
		request["options"] = object{"temperature": 0, "num_predict": tokens}
	} else {
		request["temperature"] = 0
		request["max_tokens"] = tokens
	}
	return request
}

// read takes what AOG takes of an answer, or of one object of a stream.
func (s *speaker) read(service string, data []byte, stream bool) (said, error) {
	if s.native(service) {
		return readNative(service, data)
	}
	return readOpenAI(service, data, stream)
}

func readNative(service string, data []byte) (said, error) {
	answer, err := decode[nativeJSON](data)
	if err != nil {
		return said{}, err
	}
	if answer.Model == "" || answer.CreatedAt == nil || answer.Done == nil {
		return said{}, fmt.Errorf("no model, created_at or done in %s", clip(string(data)))
	}
	found := said{finished: *answer.Done, reason: answer.DoneReason}
	switch {
	case service == "chat" && answer.Message != nil && answer.Message.Role == "assistant":
		found.text, found.thought = answer.Message.Content, answer.Message.Thinking
		for _, call := range answer.Message.ToolCalls {
			found.call += fmt.Sprintf("%s %v", call.Function.Name, call.Function.Arguments)
		}
	case service == "generate" && answer.Response != nil:
		found.text = *answer.Response
	default:
		return said{}, fmt.Errorf("neither message nor response in %s", clip(string(data)))
	}
	if found.finished && found.reason == "" {
		return said{}, fmt.Errorf("no done_reason in %s", clip(string(data)))
	}
	return found, nil
}

func readOpenAI(service string, data []byte, stream bool) (said, error) {
	answer, err := decode[openaiJSON](data)
	if err != nil {
		return said{}, err
	}
	if answer.ID == "" || answer.Model == "" || answer.Created == 0 || len(answer.Choices) != 1 {
		return said{}, fmt.Errorf("no id, model, created or choice in %s", clip(string(data)))
	}
	choice := answer.Choices[0]
	message := choice.Message
	if stream {
		message = choice.Delta
	}
	found := said{thought: message.ReasoningContent, text: message.Content, reason: choice.FinishReason}
	if service == "generate" {
		found.text = choice.Text
	}
	for _, call := range message.ToolCalls {
		var arguments map[string]any
		if err := json.Unmarshal([]byte(call.Function.Arguments), &arguments); err != nil {
			return said{}, fmt.Errorf("%w in %s", err, clip(string(data)))
		}
		found.call += fmt.Sprintf("%s %v", call.Function.Name, arguments)
	}
	found.finished = choice.FinishReason != ""
	if !stream && !found.finished {
		return said{}, fmt.Errorf("no finish_reason in %s", clip(string(data)))
	}
	return found, nil
}

// whole asks for an answer in one piece.
func (s *speaker) whole(service string, request object) (said, error) {
	ctx, cancel := bounded()
	defer cancel()
	request["stream"] = false
	data, err := s.invoke(ctx, service, request)
	if err != nil {
		return said{}, err
	}
	return s.read(service, data, false)
}

// open begins a stream.
func (s *speaker) open(ctx context.Context, service string, request object) (protocol.ProviderService_InvokeServiceStreamClient, error) {
	request["stream"] = true
	return s.rpc.InvokeServiceStream(ctx, &protocol.InvokeServiceRequest{ServiceName: service, RequestData: encode(request)})
}

// streamed reads a stream as AOG does: one text/event-stream body, an object after each `data: `. Everything is put
// together; the number is that of the objects.
func (s *speaker) streamed(service string, request object) (said, int, error) {
	ctx, cancel := context.WithTimeout(context.Background(), streamLimit)
	defer cancel()
	stream, err := s.open(ctx, service, request)
	if err != nil {
		return said{}, 0, err
	}
	var body bytes.Buffer
	final := false
	err = each(stream, func(message *protocol.InvokeServiceStreamResponse) error {
		if final {
			return errors.New("a message after is_final")
		}
		body.Write(message.GetChunkData())
		final = message.GetIsFinal()
		return nil
	})
	if err == nil && !final {
		err = errors.New("no is_final")
	}
	if err != nil {
		return said{}, 0, err
	}
	return s.together(service, &body)
}

// together reads the events of a stream's body.
func (s *speaker) together(service string, body *bytes.Buffer) (said, int, error) {
	var all said
	objects := 0
	for body.Len() > 0 {
		event, err := nextEvent(body)
		if err != nil {
			return said{}, 0, err
		}
		if event == "[DONE]" && !s.native(service) && all.finished && body.Len() == 0 {
			return all, objects, nil
		}
		one, err := s.read(service, []byte(event), true)
		if err != nil {
			return said{}, 0, err
		}
		if all.finished {
			return said{}, 0, fmt.Errorf("an object after the end: %s", clip(event))
		}
		objects++
		all = said{all.text + one.text, all.thought + one.thought, all.call + one.call, one.finished, one.reason}
	}
	if !s.native(service) {
		return said{}, 0, errors.New("no data: [DONE] at the end")
	}
	if !all.finished {
		return said{}, 0, errors.New("no object says done")
	}
	return all, objects, nil
}

// nextEvent takes the data of an event from a body.
func nextEvent(body *bytes.Buffer) (string, error) {
	var event strings.Builder
	for !strings.HasSuffix(event.String(), "\n\n") {
		line, err := body.ReadString('\n')
		if errors.Is(err, io.EOF) {
			return "", fmt.Errorf("not a whole event: %q", clip(event.String()+line))
		}
		event.WriteString(line)
	}
	data, found := strings.CutPrefix(event.String(), "data: ")
	if !found {
		return "", fmt.Errorf("not an event: %q", clip(event.String()))
	}
	return strings.TrimSuffix(data, "\n\n"), nil
}

// vectors asks for two embeddings; native ones are a list of lists, the others are found in data.
func (s *speaker) vectors(model string) (string, error) {
	ctx, cancel := bounded()
	defer cancel()
	data, err := s.invoke(ctx, "embed", object{"model": model, "input": []string{"one", "two"}})
	if err != nil {
		return "", err
	}
	var found [][]float64
	if s.native("embed") {
		answer, err := decode[nativeJSON](data)
		if err != nil {
			return "", err
		}
		found = answer.Embeddings
	} else {
		answer, err := decode[embeddingsJSON](data)
		if err != nil {
			return "", err
		}
		for index, one := range answer.Data {
			if one.Index != index {
				return "", fmt.Errorf("index %d at %d", one.Index, index)
			}
			found = append(found, one.Embedding)
		}
	}
	if len(found) != 2 || len(found[0]) == 0 || len(found[0]) != len(found[1]) {
		return "", fmt.Errorf("not two embeddings: %s", clip(string(data)))
	}
	return fmt.Sprintf("2 of %d numbers", len(found[0])), nil
}
