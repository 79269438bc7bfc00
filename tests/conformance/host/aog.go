package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"engineplugin.invalid/conformance/protocol"
)

const (
	absentModel = "no-such-model"
	failedPulls = 12
	writing     = 20 * time.Millisecond // what AOG needs for its database after each step of a pull
)

// A gateway does to messages what the AOG server does on their way between its clients and a plugin; docs/protocol.md,
// "Under AOG", has the facts.
type gateway struct {
	*session
	flavours map[string]string // by service, from config_ref
	stored   map[string]string // the state of each model, by the name that its pull asked for
	current  string            // the model that its queue has loaded
	stuck    error             // why its queue of local calls has stopped for good
}

// aog is one day of a plugin in AOG: -models names a model for each service to call, -pull what to pull besides.
func aog(r *report) {
	g := &gateway{session: spawn(nil), flavours: map[string]string{}, stored: map[string]string{}}
	g.cmd.Env = []string{"AOG_VERSION=0.7.7"} // go-plugin appends this process's environment
	defer g.client.Kill()
	if !g.begin(r) || !r.check("boot", g.boot) {
		return
	}
	r.check("failed pulls are reported as failed", g.failingPulls)
	for _, service := range slices.Sorted(maps.Keys(models)) {
		if model := models[service]; g.stored[model] == "" {
			r.check("pull "+model, func() (string, error) { return g.pull(model, service) })
		}
	}
	r.check("a call for a deleted model", g.gone)
	for _, service := range slices.Sorted(maps.Keys(models)) {
		g.serve(r, service, models[service])
	}
	if pullable != "" {
		r.check("a model by its reference", g.byReference)
	}
	r.check("the cleaner", g.clean)
	r.check("Kill", g.kill)
	r.check("no error in the host's log", g.noErrors)
}

func (g *gateway) serve(r *report, service, model string) {
	switch service {
	case "chat", "generate":
		r.check("/v1 "+service, func() (string, error) { return g.completed(service, model) })
		r.check("/v1 "+service+" streamed", func() (string, error) { return g.streamed(service, model) })
	case "speech-to-text-ws":
		r.check(service, func() (string, error) { return g.websocket(model) })
		r.check(service+" with a model that is gone", g.websocketGone)
	default:
		r.check(service, func() (string, error) { return g.called(service, model) })
	}
}

// boot asks a plugin that is not started what AOG asks often, then starts and upgrades its engine.
func (g *gateway) boot() (string, error) {
	ctx, cancel := unbounded()
	defer cancel()
	for range 5 {
		if _, err := g.rpc.HealthCheck(ctx, &protocol.HealthCheckRequest{}); err != nil {
			return "", err
		}
		if _, err := g.rpc.GetRunningModels(ctx, &protocol.GetRunningModelsRequest{}); err != nil {
			return "", err
		}
		answer, err := g.rpc.GetManifest(ctx, &protocol.GetManifestRequest{})
		if err != nil {
			return "", err
		}
		manifest, err := decode[manifestJSON](answer.GetManifestJson())
		if err != nil {
			return "", err
		}
		for _, service := range manifest.Services {
			g.flavours[service.ServiceName], _, _ = strings.Cut(service.ConfigRef, ":")
		}
	}
	started, err := g.rpc.StartEngine(ctx, &protocol.StartEngineRequest{Mode: "daemon"})
	if err != nil {
		return "", err
	}
	if err := success(started); err != nil {
		return "", err
	}
	_, err = g.rpc.UpgradeEngine(ctx, &protocol.UpgradeEngineRequest{})
	return fmt.Sprint(g.flavours), err
}

// pull has a model pulled as AOG does, which looks at nothing but the stream's data, and stores the name that was asked
// for. It reads data and the end from two channels, in no order.
func (g *gateway) pull(reference, service string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), streamLimit)
	defer cancel()
	stream, err := g.rpc.PullModelStream(ctx, &protocol.PullModelStreamRequest{
		RequestJson: encode(object{"model": reference, "stream": true, "model_type": service}),
	})
	if err != nil {
		return "", err
	}
	data, ended := make(chan []byte, 10), make(chan error, 1)
	go func() {
		defer close(data)
		defer close(ended)
		err := each(stream, func(message *protocol.PullModelStreamResponse) error {
			data <- message.GetData()
			return nil
		})
		if err != nil {
			ended <- err
		}
	}()
	g.stored[reference] = "downloading"
	for {
		time.Sleep(writing)
		select {
		case step, open := <-data:
			if !open {
				return g.state(reference, "")
			}
			shape, err := decode[struct {
				progressJSON
				Error *string `json:"error"`
			}](step)
			switch {
			case err != nil:
				continue
			case shape.Error != nil:
				g.stored[reference] = "failed"
				return g.state(reference, *shape.Error)
			case shape.Status == "success":
				g.stored[reference] = "downloaded"
			}
		case _, open := <-ended:
			if !open {
				return g.state(reference, "")
			}
		}
	}
}

func (g *gateway) state(reference, said string) (string, error) {
	if state := g.stored[reference]; state != "downloaded" {
		return "", fmt.Errorf("%s: %s %s", reference, state, said)
	}
	return "downloaded", nil
}

// failingPulls sees that AOG never takes a pull that has failed for one that goes on.
func (g *gateway) failingPulls() (string, error) {
	for number := range failedPulls {
		name := fmt.Sprintf("/nowhere/%s-%d.gguf", absentModel, number)
		if _, err := g.pull(name, "chat"); g.stored[name] != "failed" {
			return "", fmt.Errorf("pull %d: %w", number, err)
		}
	}
	return fmt.Sprintf("%d of %d", failedPulls, failedPulls), nil
}

// load is AOG's queue: it unloads the model that it has and loads the one that is wanted, and after a load that has
// failed it never goes on.
func (g *gateway) load(model string) error {
	if g.stuck != nil || g.current == model {
		return g.stuck
	}
	if g.current != "" {
		if err := g.unload(g.current); err != nil {
			return err
		}
	}
	ctx, cancel := unbounded()
	defer cancel()
	answer, err := g.rpc.LoadModel(ctx, &protocol.LoadModelRequest{RequestJson: encode(object{"model": model})})
	if err == nil {
		err = success(answer)
	}
	if err != nil {
		g.stuck = fmt.Errorf("the queue has stopped for good after LoadModel: %w", err)
		return g.stuck
	}
	g.current = model
	return nil
}

func (g *gateway) unload(model string) error {
	ctx, cancel := unbounded()
	defer cancel()
	request := encode(object{"models": []string{model}})
	answer, err := g.rpc.UnloadModel(ctx, &protocol.UnloadModelRequest{RequestJson: request})
	if err == nil {
		err = success(answer)
	}
	g.current = ""
	return err
}

// call sends a request with the fields that AOG's conversion leaves, after its queue has loaded the model.
func (g *gateway) call(service, model string, request object) ([]byte, error) {
	if service != "embed" {
		if err := g.load(model); err != nil {
			return nil, err
		}
	}
	ctx, cancel := bounded()
	defer cancel()
	request["model"] = model
	return g.invoke(ctx, service, request)
}

func (g *gateway) completionRequest(service string) object {
	request := object{"max_tokens": 8, "temperature": 0}
	switch {
	case service == "chat":
		request["messages"] = []object{{"role": "user", "content": "count 5"}}
	default:
		request["prompt"] = "one two"
	}
	if g.flavours[service] == "ollama" {
		delete(request, "max_tokens")
		delete(request, "temperature")
		request["options"] = object{"num_predict": 8, "temperature": 0}
	}
	return request
}

// A completion is what AOG makes of an answer in a plugin's flavour, before it makes its own OpenAI answer of it.
type completion struct {
	text, reason string
	at           time.Time
}

// converted does as AOG's conversions do. Its OpenAI routes need the time as text, whatever the flavour.
func (g *gateway) converted(service string, data []byte) (completion, error) {
	if g.flavours[service] == "ollama" {
		answer, err := decode[nativeJSON](data)
		if err != nil || answer.CreatedAt == nil {
			return completion{}, fmt.Errorf("no created_at in %s (%v)", clip(string(data)), err)
		}
		text := ""
		if answer.Message != nil {
			text = answer.Message.Content
		} else if answer.Response != nil {
			text = *answer.Response
		}
		return completion{text, answer.DoneReason, *answer.CreatedAt}, nil
	}
	answer, err := decode[struct {
		completionJSON
		Created json.RawMessage `json:"created"`
	}](data)
	if err != nil {
		return completion{}, err
	}
	var created string
	if err := json.Unmarshal(answer.Created, &created); err != nil {
		return completion{}, fmt.Errorf("created is %s, not text: AOG answers 500", answer.Created)
	}
	at, err := time.Parse(time.RFC3339, created)
	made := completion{at: at}
	for _, choice := range answer.Choices {
		made.text += choice.Message.Content + choice.Delta.Content + choice.Text
		if choice.FinishReason != nil {
			made.reason = *choice.FinishReason
		}
	}
	return made, err
}

// whole looks at what a client of AOG's OpenAI routes gets.
func (c completion) whole() (string, error) {
	if c.text == "" || c.reason == "" || c.at.IsZero() {
		return "", fmt.Errorf("no text, reason or time: %+v", c)
	}
	return fmt.Sprintf("%q, %s", c.text, c.reason), nil
}

func (g *gateway) completed(service, model string) (string, error) {
	data, err := g.call(service, model, g.completionRequest(service))
	if err != nil {
		return "", err
	}
	made, err := g.converted(service, data)
	if err != nil {
		return "", err
	}
	return made.whole()
}

// streamed reads a stream as AOG does: it cuts where an empty line is, and takes what follows `data: ` for JSON.
func (g *gateway) streamed(service, model string) (string, error) {
	if err := g.load(model); err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(context.Background(), streamLimit)
	defer cancel()
	request := g.completionRequest(service)
	request["model"], request["stream"] = model, true
	stream, err := g.rpc.InvokeServiceStream(ctx, &protocol.InvokeServiceRequest{
		ServiceName: service, RequestData: encode(request),
	})
	if err != nil {
		return "", err
	}
	var body bytes.Buffer
	err = each(stream, func(message *protocol.InvokeServiceStreamResponse) error {
		body.Write(message.GetChunkData())
		return nil
	})
	if err != nil {
		return "", err
	}
	var all completion
	events := strings.Split(strings.TrimSuffix(body.String(), "\n\n"), "\n\n")
	for _, event := range events {
		data, found := strings.CutPrefix(event, "data: ")
		if !found {
			return "", fmt.Errorf("AOG breaks the stream off at %q", clip(event))
		}
		if strings.TrimSpace(data) == "[DONE]" {
			break
		}
		made, err := g.converted(service, []byte(data))
		if err != nil {
			return "", err
		}
		all.text, all.at = all.text+made.text, made.at
		if made.reason != "" {
			all.reason = made.reason
		}
	}
	return all.whole()
}

// called sends the requests of the services whose answers AOG hands on as they are.
func (g *gateway) called(service, model string) (string, error) {
	request, known := map[string]object{
		"embed":         {"input": []string{"one", "two"}},
		"rerank":        {"query": "a cat", "documents": []string{"dog", "cat"}, "top_n": 1},
		"text-to-image": {"prompt": "a cat", "size": "64*64", "num_inference_steps": 1, "rng_seed": 42},
		"speech-to-text": {
			"audio": base64.StdEncoding.EncodeToString(wavOf(voice(1))), "language": "en",
		},
		"text-to-speech": {"input": "Hello."},
	}[service]
	if !known {
		return "", fmt.Errorf("AOG has no service %q", service)
	}
	data, err := g.call(service, model, request)
	if err != nil {
		return "", err
	}
	answer, err := decode[map[string]any](data)
	if err != nil {
		return "", err
	}
	part := map[string]string{
		"embed": "data", "rerank": "results", "text-to-image": "data", "speech-to-text": "segments", "text-to-speech": "url",
	}[service]
	if answer[part] == nil {
		return "", fmt.Errorf("no %s in %s", part, clip(string(data)))
	}
	return clip(string(data)), nil
}

// gone has AOG call a model that it knows and the plugin does not: the call says so, and the next one is answered. Some
// servers answer for any name, but nothing can be pulled to them.
func (g *gateway) gone() (string, error) {
	_, err := g.call("chat", absentModel, g.completionRequest("chat"))
	switch {
	case g.stuck != nil:
		return "", g.stuck
	case err != nil && strings.Contains(err.Error(), absentModel):
		return err.Error(), nil
	case err == nil && pullable == "":
		return "it is answered all the same", nil
	}
	return "", fmt.Errorf("not an error that names %s: %w", absentModel, err)
}

// byReference pulls what -pull names and uses the model by that name alone, as AOG does.
func (g *gateway) byReference() (string, error) {
	if _, err := g.pull(pullable, "chat"); err != nil {
		return "", err
	}
	if _, err := g.completed("chat", pullable); err != nil {
		return "", err
	}
	ctx, cancel := bounded()
	defer cancel()
	listed, err := g.rpc.ListModels(ctx, &protocol.ListModelsRequest{})
	if err != nil {
		return "", err
	}
	list, err := decode[modelsJSON](listed.GetResponseJson())
	if err != nil {
		return "", err
	}
	names := map[string]int{}
	for _, model := range list.Models {
		names[model.Name]++
	}
	if names[pullable] != 1 {
		return "", fmt.Errorf("it is not once in the list: %v", names)
	}
	if err := g.unload(pullable); err != nil {
		return "", err
	}
	deleted, err := g.rpc.DeleteModel(ctx, &protocol.DeleteModelRequest{RequestJson: encode(object{"model": pullable})})
	if err != nil {
		return "", err
	}
	if err := success(deleted); err != nil {
		return "", err
	}
	if _, err := g.call("chat", pullable, g.completionRequest("chat")); err == nil {
		return "", errors.New("it answers although it was deleted")
	}
	return "pulled, called, listed, unloaded, deleted", nil
}

// clean asks again and again to unload what is not loaded.
func (g *gateway) clean() (string, error) {
	unloaded := []string{models["chat"], models["chat"], absentModel}
	if pullable != "" {
		unloaded = append(unloaded, pullable)
	}
	for _, model := range unloaded {
		if err := g.unload(model); err != nil {
			return "", fmt.Errorf("%s: %w", model, err)
		}
	}
	return "nothing to complain of", nil
}
