package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"engineplugin.invalid/conformance/protocol"
)

// connectionID is that of a websocket of AOG, which is its client's task id as well.
const connectionID = "c0ffee00-0000-4000-8000-000000000001"

// An event as AOG's own client decodes it.
type eventJSON struct {
	Header struct {
		TaskID       string `json:"task_id"`
		Event        string `json:"event"`
		ErrorCode    string `json:"error_code"`
		ErrorMessage string `json:"error_message"`
	} `json:"header"`
	Payload struct {
		Output struct {
			Sentence struct {
				BeginTime *int   `json:"begin_time"`
				EndTime   *int   `json:"end_time"`
				Text      string `json:"text"`
			} `json:"sentence"`
		} `json:"output"`
	} `json:"payload"`
}

// websocket goes the way of AOG's own client: run-task, sound, finish-task. AOG reduces both commands to the model's
// name, tells its client itself that the task has started, and never ends the stream.
func (g *gateway) websocket(model string) (string, error) {
	events, err := g.talk(model, voice(2))
	if err != nil {
		return "", err
	}
	last := events[len(events)-1]
	if last.Header.Event != "task-finished" || len(events) < 2 {
		return "", fmt.Errorf("%d events, the last %+v", len(events), last.Header)
	}
	return fmt.Sprintf("%d results", len(events)-1), nil
}

// websocketGone asks for a model that the plugin does not have.
func (g *gateway) websocketGone() (string, error) {
	events, err := g.talk(absentModel, voice(0.5))
	if len(events) != 1 || events[0].Header.Event != "task-failed" || events[0].Header.ErrorCode != "404" {
		return "", fmt.Errorf("not one task-failed with 404: %+v (%v)", events, err)
	}
	return events[0].Header.ErrorMessage, nil
}

func (g *gateway) talk(model string, sound []byte) ([]eventJSON, error) {
	if err := g.load(model); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), unaryTimeout)
	defer cancel()
	stream, err := g.rpc.InvokeServiceBidi(ctx)
	if err != nil {
		return nil, err
	}
	command, metadata := encode(object{"model": model}), liveMetadata(model)
	first := maps.Clone(metadata)
	first["ws_conn_id"] = connectionID
	messages := []*protocol.InvokeServiceBidiRequest{{
		ServiceName: "speech-to-text-ws", Data: command, MessageType: "text", Metadata: first, IsFirst: true,
	}}
	for piece := range slices.Chunk(sound, 2*pieceSamples) {
		messages = append(messages, &protocol.InvokeServiceBidiRequest{Data: piece, MessageType: "binary", Metadata: metadata})
	}
	messages = append(messages, &protocol.InvokeServiceBidiRequest{Data: command, MessageType: "text", Metadata: metadata})
	go func() {
		for _, message := range messages {
			if stream.Send(message) != nil {
				return // the reader says why
			}
		}
	}()
	var events []eventJSON
	err = each(stream, func(message *protocol.InvokeServiceBidiResponse) error {
		event, err := decode[eventJSON](message.GetData())
		switch {
		case err != nil:
			return err
		case event.Header.Event == "task-started":
			return errors.New("a second task-started: AOG's client panics")
		case event.Header.TaskID != connectionID:
			return fmt.Errorf("task %q is not the one that the client knows", event.Header.TaskID)
		}
		events = append(events, event)
		return nil
	})
	if err == nil && len(events) == 0 {
		err = errors.New("no events")
	}
	return events, err
}
