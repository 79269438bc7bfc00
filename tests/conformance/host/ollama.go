package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strings"

	"engineplugin.invalid/conformance/protocol"
)

// Models of the server that tests/engines/ollama/contract is; some it has, some it can pull.
const (
	tinyModel    = "tiny-chat:latest"
	thinkModel   = "think:8b"
	toolModel    = "tools:7b"
	vectorModel  = "embed:latest"
	freshModel   = "fresh:latest"
	endlessModel = "fault-endless:latest" // it never stops talking
	brokenModel  = "fault-pull-breaks:latest"

	counting, counted = "count 5", "1 2 3 4 5"
)

// ollama tests an attached Ollama at OLLAMA_HOST, which the plugin does not start and which outlives it.
func ollama(r *report) {
	s := &speaker{session: spawn(nil)}
	defer s.client.Kill()
	if !s.begin(r) || !r.check("GetManifest", s.manifest) {
		return
	}
	simple(r, "HealthCheck", bounded, func(ctx context.Context) (coded, error) {
		return s.rpc.HealthCheck(ctx, &protocol.HealthCheckRequest{})
	})
	r.check("ListModels", func() (string, error) { return s.listed(tinyModel, thinkModel, toolModel, vectorModel) })
	s.speaking(r)
	s.loading(r, tinyModel)
	s.pulling(r)
	s.killing(r, "the server goes on", func() (string, error) { return greet(os.Getenv("OLLAMA_HOST")) })
}

// ollamaManaged is with an Ollama of our own, installed by InstallEngine, that ends with the plugin.
func ollamaManaged(r *report) {
	s := &speaker{session: spawn(nil)}
	defer s.client.Kill()
	if !s.begin(r) || !r.check("GetManifest", s.manifest) {
		return
	}
	address := s.managed(r)
	if address == "" {
		return
	}
	s.loading(r, freshModel)
	r.check("chat", func() (string, error) { return s.says(s.whole("chat", s.ask("chat", freshModel, counting, 16, nil))) })
	s.killing(r, "the server is gone", func() (string, error) {
		_, err := greet(address)
		if err == nil {
			return "", errors.New("it still answers at " + address)
		}
		return err.Error(), nil
	})
}

// ollamaHold leaves an Ollama of our own and a stream of it running, for a test that kills the plugin.
func ollamaHold(r *report) {
	s := &speaker{session: spawn(nil)}
	defer s.client.Kill()
	ended := make(chan error, 1)
	if !s.begin(r) || !r.check("GetManifest", s.manifest) || s.managed(r) == "" {
		return
	}
	s.loading(r, freshModel)
	if r.check("holding", func() (string, error) { return s.keepTalking(ended) }) {
		<-ended
	}
}

// managed installs and starts an Ollama of our own, and pulls; the address, "" when it is not there.
func (s *speaker) managed(r *report) string {
	installed := simple(r, "InstallEngine", unbounded, func(ctx context.Context) (coded, error) {
		return s.rpc.InstallEngine(ctx, &protocol.InstallEngineRequest{Cover: false})
	})
	started := installed && simple(r, "StartEngine", unbounded, func(ctx context.Context) (coded, error) {
		return s.rpc.StartEngine(ctx, &protocol.StartEngineRequest{Mode: "daemon"})
	})
	pulled := started && r.check("PullModelStream", func() (string, error) { return s.pullLayers(freshModel) }) &&
		r.check("PullModelStream of an endless pull", func() (string, error) { return s.pullLayers(endlessModel) })
	address := ""
	r.check("GetConfig", func() (string, error) {
		ctx, cancel := bounded()
		defer cancel()
		answer, err := s.rpc.GetConfig(ctx, &protocol.GetConfigRequest{})
		if err != nil {
			return "", err
		}
		config, err := decode[configJSON](answer.GetConfigJson())
		if err != nil {
			return "", err
		}
		if _, err := greet(config.Host); err != nil {
			return "", err
		}
		address = config.Host
		return address, nil
	})
	if !pulled {
		return ""
	}
	return address
}

// greet is what a server says at the root.
func greet(address string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), soon)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address, nil)
	if err != nil {
		return "", err
	}
	answer, err := http.DefaultClient.Do(request)
	if err != nil {
		return "", err
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	if err == nil && string(text) != "Ollama is running" {
		err = fmt.Errorf("%q", clip(string(text)))
	}
	return string(text), err
}

// manifest learns the flavours, and sees that what the server has is on offer where plugin.yaml names no models.
func (s *speaker) manifest() (string, error) {
	ctx, cancel := unbounded()
	defer cancel()
	answer, err := s.rpc.GetManifest(ctx, &protocol.GetManifestRequest{})
	if err != nil {
		return "", err
	}
	if err := success(answer); err != nil {
		return "", err
	}
	manifest, err := decode[manifestJSON](answer.GetManifestJson())
	if err != nil {
		return "", err
	}
	s.flavours = map[string]string{}
	var refs []string
	for _, service := range manifest.Services {
		flavour, named, found := strings.Cut(service.ConfigRef, ":")
		if !found || named != service.ServiceName {
			return "", fmt.Errorf("config_ref %q of %s", service.ConfigRef, service.ServiceName)
		}
		s.flavours[service.ServiceName] = flavour
		refs = append(refs, fmt.Sprintf("%s(%d models)", service.ConfigRef, len(service.SupportModels)))
	}
	return strings.Join(refs, " "), nil
}

func (s *speaker) models() ([]string, error) {
	ctx, cancel := bounded()
	defer cancel()
	answer, err := s.rpc.ListModels(ctx, &protocol.ListModelsRequest{})
	if err != nil {
		return nil, err
	}
	if err := success(answer); err != nil {
		return nil, err
	}
	list, err := decode[modelsJSON](answer.GetResponseJson())
	var names []string
	for _, model := range list.Models {
		if model.ModifiedAt.IsZero() || model.Size <= 0 || model.Digest == "" || model.Model == "" ||
			model.Details == nil || model.Details.Format == "" || model.Details.ParameterSize == "" {
			return nil, fmt.Errorf("an incomplete model: %+v", model)
		}
		names = append(names, model.Name)
	}
	return names, err
}

func (s *speaker) listed(wanted ...string) (string, error) {
	names, err := s.models()
	for _, name := range wanted {
		if err == nil && !slices.Contains(names, name) {
			err = fmt.Errorf("%s is not among %v", name, names)
		}
	}
	return strings.Join(names, " "), err
}

// speaking asks for everything that the templates of the flavours carry.
func (s *speaker) speaking(r *report) {
	for _, service := range []string{"chat", "generate"} {
		r.check(service, func() (string, error) {
			return s.says(s.whole(service, s.ask(service, tinyModel, counting, 16, nil)))
		})
		r.check(service+" stream", func() (string, error) {
			found, objects, err := s.streamed(service, s.ask(service, tinyModel, counting, 16, nil))
			if err == nil && objects < 6 {
				err = fmt.Errorf("only %d objects for five words and the end", objects)
			}
			return s.says(found, err)
		})
	}
	r.check("max_tokens ends the answer", func() (string, error) {
		found, err := s.whole("chat", s.ask("chat", tinyModel, counting, 2, nil))
		if err == nil && (found.text != "1 2" || found.reason != "length") {
			err = fmt.Errorf("%+v", found)
		}
		return found.reason, err
	})
	r.check("thinking", func() (string, error) {
		found, _, err := s.streamed("chat", s.ask("chat", thinkModel, counting, 64, nil))
		if err == nil && found.thought == "" {
			err = errors.New("nothing was thought")
		}
		return s.says(found, err)
	})
	r.check("a tool", s.callsTool)
	r.check("embed", func() (string, error) { return s.vectors(vectorModel) })
	r.check("a missing model", func() (string, error) {
		ctx, cancel := bounded()
		defer cancel()
		request := s.ask("chat", "absent:1b", counting, 16, nil)
		answer, err := s.rpc.InvokeService(ctx, &protocol.InvokeServiceRequest{ServiceName: "chat", RequestData: encode(request)})
		if err != nil {
			return "", err
		}
		if !strings.Contains(answer.GetMessage(), "PullModel absent:1b") {
			return "", fmt.Errorf("it is not said how to get it: %s", answer.GetMessage())
		}
		return failure(answer, 404)
	})
}

// says sees that the five numbers were said, and that this was the end.
func (s *speaker) says(found said, err error) (string, error) {
	if err == nil && (found.text != counted || !found.finished || found.reason != "stop") {
		err = fmt.Errorf("%+v", found)
	}
	return fmt.Sprintf("%q, %s", found.text, found.reason), err
}

func (s *speaker) callsTool() (string, error) {
	tools := []object{{"type": "function", "function": object{
		"name":       "weather",
		"parameters": object{"type": "object", "properties": object{"city": object{"type": "string"}}},
	}}}
	found, _, err := s.streamed("chat", s.ask("chat", toolModel, "how is Rome", 64, tools))
	if err == nil && !strings.HasPrefix(found.call, "weather map[city:") {
		err = fmt.Errorf("%+v", found)
	}
	return found.call, err
}

// loading has a model in memory and out of it.
func (s *speaker) loading(r *report, model string) {
	held := func(wanted bool) (string, error) {
		names, err := s.runningModels()
		if err == nil && slices.Contains(names, model) != wanted {
			err = fmt.Errorf("in memory: %v", names)
		}
		return strings.Join(names, " "), err
	}
	load := func(ctx context.Context) (coded, error) {
		return s.rpc.LoadModel(ctx, &protocol.LoadModelRequest{RequestJson: encode(object{"model": model})})
	}
	simple(r, "LoadModel", bounded, load)
	r.check("GetRunningModels", func() (string, error) { return held(true) })
	simple(r, "UnloadModel", bounded, func(ctx context.Context) (coded, error) {
		return s.rpc.UnloadModel(ctx, &protocol.UnloadModelRequest{RequestJson: encode(object{"models": []string{model}})})
	})
	r.check("GetRunningModels after UnloadModel", func() (string, error) { return held(false) })
	simple(r, "LoadModel again", bounded, load)
}

// pulling brings a model of several layers, one whose pull fails, and takes the first away again.
func (s *speaker) pulling(r *report) {
	r.check("PullModelStream", func() (string, error) { return s.pullLayers(freshModel) })
	r.check("ListModels after the pull", func() (string, error) { return s.listed(freshModel) })
	r.check("a pull that breaks off", s.pullFails)
	r.check("PullModelStream of an endless pull", func() (string, error) { return s.pullLayers(endlessModel) })
	simple(r, "DeleteModel", bounded, func(ctx context.Context) (coded, error) {
		return s.rpc.DeleteModel(ctx, &protocol.DeleteModelRequest{RequestJson: encode(object{"model": freshModel})})
	})
	r.check("ListModels after DeleteModel", func() (string, error) {
		names, err := s.models()
		if err == nil && (slices.Contains(names, freshModel) || slices.Contains(names, brokenModel)) {
			err = fmt.Errorf("%v", names)
		}
		return strings.Join(names, " "), err
	})
}

func (s *speaker) openPull(ctx context.Context, model string) (protocol.ProviderService_PullModelStreamClient, error) {
	request := encode(object{"model": model, "stream": true})
	return s.rpc.PullModelStream(ctx, &protocol.PullModelStreamRequest{RequestJson: request})
}

// pullLayers sees each layer counted to its own end, and success after all of them.
func (s *speaker) pullLayers(model string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), streamLimit)
	defer cancel()
	stream, err := s.openPull(ctx, model)
	if err != nil {
		return "", err
	}
	layers := map[string]progressJSON{}
	last := ""
	err = each(stream, func(message *protocol.PullModelStreamResponse) error {
		progress, err := decode[progressJSON](message.GetData())
		if err != nil {
			return err
		}
		last = progress.Status
		if progress.Digest != "" && progress.Status != "success" {
			layers[progress.Digest] = progress
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	for digest, layer := range layers {
		if layer.Total <= 0 || layer.Completed != layer.Total {
			return "", fmt.Errorf("layer %s ended at %d of %d", digest, layer.Completed, layer.Total)
		}
	}
	if last != "success" || len(layers) < 2 {
		return "", fmt.Errorf("%d layers, at last %q", len(layers), last)
	}
	return fmt.Sprintf("%d layers, success", len(layers)), nil
}

// pullFails pulls what fails after the server has said 200.
func (s *speaker) pullFails() (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), streamLimit)
	defer cancel()
	stream, err := s.openPull(ctx, brokenModel)
	if err != nil {
		return "", err
	}
	for began := false; ; began = true {
		answer, err := stream.Recv()
		if err != nil {
			return "", fmt.Errorf("it ended without saying why: %w", err)
		}
		if success(answer) == nil {
			continue
		}
		if !began || !strings.Contains(answer.GetMessage(), "max retries exceeded") {
			return "", success(answer)
		}
		if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
			return "", fmt.Errorf("no clean end: %w", err)
		}
		return success(answer).Error(), nil
	}
}

// keepTalking opens a stream without an end and goes on reading it; its end comes on `ended`, never nil.
func (s *speaker) keepTalking(ended chan<- error) (string, error) {
	return s.keepReading(ended, func(ctx context.Context) (protocol.ProviderService_InvokeServiceStreamClient, error) {
		return s.open(ctx, "chat", s.ask("chat", endlessModel, "go on", longAnswer, nil))
	})
}

// killing kills the plugin while it streams; `after` looks at the server then.
func (s *speaker) killing(r *report, name string, after func() (string, error)) {
	ended := make(chan error, 1)
	if !r.check("first chunk", func() (string, error) { return s.keepTalking(ended) }) {
		return
	}
	r.check("Kill during a stream", s.kill)
	r.check("the stream ends with an error", func() (string, error) { return endsWithError(ended) })
	r.check(name, after)
	r.check("no error in the host's log", s.noErrors)
}
