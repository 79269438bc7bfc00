package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"engineplugin.invalid/conformance/protocol"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// The plugin's default models, known once it has begun.
var chatModel, embedModel, rerankModel string

const (
	// More tokens than the tiny model says in a second or two; and more calls than an engine answers at once.
	longAnswer = 4000
	abandoned  = 24
)

// An object is a JSON object under construction.
type object map[string]any

// lifecycle goes the way of a host's day: software, life, models, services, and the end.
func lifecycle(r *report) {
	s := spawn(nil)
	defer s.client.Kill()
	if !s.begin(r) {
		return
	}
	s.software(r)
	s.starting(r)
	s.fetching(r)
	s.services(r)
	s.stopping(r)
	s.ending(r)
	r.check("every method was called", s.allMethods)
	r.check("Kill", s.kill)
	r.check("no error in the host's log", s.noErrors)
}

// unbounded is a context without a deadline, as AOG has it for the calls of an engine's life.
func unbounded() (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(context.Background())
	timer := time.AfterFunc(patience, cancel)
	return ctx, func() { timer.Stop(); cancel() }
}

func bounded() (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), unaryTimeout)
}

// simple checks a call whose whole answer is its code.
func simple[T coded](r *report, name string, open func() (context.Context, context.CancelFunc),
	call func(context.Context) (T, error)) bool {
	return r.check(name, func() (string, error) {
		ctx, cancel := open()
		defer cancel()
		answer, err := call(ctx)
		if err != nil {
			return "", err
		}
		return clip(answer.GetMessage()), success(answer)
	})
}

func (s *session) software(r *report) {
	r.check("GetManifest", s.getManifest)
	r.check("CheckEngine", func() (string, error) {
		ctx, cancel := unbounded()
		defer cancel()
		answer, err := s.rpc.CheckEngine(ctx, &protocol.CheckEngineRequest{})
		if err != nil {
			return "", err
		}
		return fmt.Sprintf("installed: %t %s", answer.GetInstalled(), answer.GetMessage()), success(answer)
	})
	simple(r, "InstallEngine", unbounded, func(ctx context.Context) (coded, error) {
		return s.rpc.InstallEngine(ctx, &protocol.InstallEngineRequest{Cover: false})
	})
	simple(r, "InitEnv", unbounded, func(ctx context.Context) (coded, error) {
		return s.rpc.InitEnv(ctx, &protocol.InitEnvRequest{})
	})
}

func (s *session) getManifest() (string, error) {
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
	if manifest.Provider.Name == "" || manifest.Provider.Version == "" || manifest.Provider.Type != "local" {
		return "", fmt.Errorf("provider %+v", manifest.Provider)
	}
	var names []string
	defaults := map[string]*string{"chat": &chatModel, "embed": &embedModel, "rerank": &rerankModel}
	for _, service := range manifest.Services {
		if known, wanted := defaults[service.ServiceName]; wanted {
			*known = service.DefaultModel
		}
		if service.TaskType == "" || service.ExposeProtocol == "" {
			return "", fmt.Errorf("service %+v", service)
		}
		names = append(names, fmt.Sprintf("%s(%d)", service.ServiceName, service.Timeout))
	}
	if len(names) == 0 || len(manifest.Platforms) == 0 {
		return "", fmt.Errorf("%d services, %d platforms", len(names), len(manifest.Platforms))
	}
	return fmt.Sprintf("%s %s: %s", manifest.Provider.Name, manifest.Provider.Version, strings.Join(names, " ")), nil
}

func (s *session) starting(r *report) {
	simple(r, "StartEngine", unbounded, func(ctx context.Context) (coded, error) {
		return s.rpc.StartEngine(ctx, &protocol.StartEngineRequest{Mode: "daemon"})
	})
	simple(r, "StartEngine again", unbounded, func(ctx context.Context) (coded, error) {
		return s.rpc.StartEngine(ctx, &protocol.StartEngineRequest{Mode: "standard"})
	})
	simple(r, "HealthCheck", bounded, func(ctx context.Context) (coded, error) {
		return s.rpc.HealthCheck(ctx, &protocol.HealthCheckRequest{})
	})
	r.check("GetVersion", s.getVersion)
	r.check("GetConfig", s.getConfig)
	r.check("GetOperateStatus", func() (string, error) { return s.operateStatus(1) })
	r.check("SetOperateStatus", s.setOperateStatus)
}

func (s *session) getVersion() (string, error) {
	ctx, cancel := bounded()
	defer cancel()
	answer, err := s.rpc.GetVersion(ctx, &protocol.GetVersionRequest{})
	if err != nil {
		return "", err
	}
	if err := success(answer); err != nil {
		return "", err
	}
	version, err := decode[versionJSON](answer.GetResponseJson())
	if err == nil && version.Version == "" {
		err = errors.New("an empty version")
	}
	return version.Version, err
}

func (s *session) getConfig() (string, error) {
	ctx, cancel := bounded()
	defer cancel()
	answer, err := s.rpc.GetConfig(ctx, &protocol.GetConfigRequest{})
	if err != nil {
		return "", err
	}
	if err := success(answer); err != nil {
		return "", err
	}
	config, err := decode[configJSON](answer.GetConfigJson())
	return fmt.Sprintf("host %q, device %q, recommends %q", config.Host, config.DeviceType, config.RecommendModel), err
}

func (s *session) operateStatus(want int32) (string, error) {
	ctx, cancel := unbounded()
	defer cancel()
	answer, err := s.rpc.GetOperateStatus(ctx, &protocol.GetOperateStatusRequest{})
	if err != nil {
		return "", err
	}
	if answer.GetStatus() != want {
		return "", fmt.Errorf("status %d, not %d", answer.GetStatus(), want)
	}
	return fmt.Sprintf("status %d", want), nil
}

func (s *session) setOperateStatus() (string, error) {
	ctx, cancel := unbounded()
	defer cancel()
	if _, err := s.rpc.SetOperateStatus(ctx, &protocol.SetOperateStatusRequest{Status: 1}); err != nil {
		return "", err
	}
	return s.operateStatus(1)
}

func (s *session) fetching(r *report) {
	r.check("PullModel", s.pullModel)
	for _, model := range []string{embedModel, rerankModel} {
		r.check("PullModelStream "+model, func() (string, error) { return s.pullStream(model) })
	}
	r.check("ListModels", s.listModels)
	simple(r, "LoadModel", bounded, func(ctx context.Context) (coded, error) {
		return s.rpc.LoadModel(ctx, &protocol.LoadModelRequest{RequestJson: encode(object{"model": chatModel})})
	})
	r.check("GetRunningModels", func() (string, error) {
		names, err := s.runningModels()
		if err == nil && !slices.Contains(names, chatModel) {
			err = fmt.Errorf("%s is not among %v", chatModel, names)
		}
		return strings.Join(names, " "), err
	})
}

func (s *session) pullModel() (string, error) {
	ctx, cancel := bounded()
	defer cancel()
	request := encode(object{"model": chatModel, "stream": false})
	answer, err := s.rpc.PullModel(ctx, &protocol.PullModelRequest{RequestJson: request})
	if err != nil {
		return "", err
	}
	if err := success(answer); err != nil {
		return "", err
	}
	progress, err := decode[progressJSON](answer.GetResponseJson())
	if err == nil && progress.Status != "success" {
		err = fmt.Errorf("status %q", progress.Status)
	}
	return progress.Status, err
}

func (s *session) pullStream(model string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), streamLimit)
	defer cancel()
	request := encode(object{"model": model, "stream": true})
	stream, err := s.rpc.PullModelStream(ctx, &protocol.PullModelStreamRequest{RequestJson: request})
	if err != nil {
		return "", err
	}
	var last progressJSON
	messages := 0
	err = each(stream, func(message *protocol.PullModelStreamResponse) error {
		var err error
		if last, err = decode[progressJSON](message.GetData()); err != nil {
			return err
		}
		if last.Completed > last.Total {
			return fmt.Errorf("completed %d of %d", last.Completed, last.Total)
		}
		messages++
		return nil
	})
	if err != nil {
		return "", err
	}
	if last.Status != "success" {
		return "", fmt.Errorf("ended with status %q after %d messages", last.Status, messages)
	}
	return fmt.Sprintf("%d messages, the last: success", messages), nil
}

func (s *session) listModels() (string, error) {
	ctx, cancel := bounded()
	defer cancel()
	answer, err := s.rpc.ListModels(ctx, &protocol.ListModelsRequest{})
	if err != nil {
		return "", err
	}
	if err := success(answer); err != nil {
		return "", err
	}
	list, err := decode[modelsJSON](answer.GetResponseJson())
	if err != nil {
		return "", err
	}
	found := map[string]bool{}
	for _, model := range list.Models {
		if model.ModifiedAt.IsZero() || model.Size <= 0 || model.Model == "" || model.Details == nil || model.Details.Format == "" {
			return "", fmt.Errorf("an incomplete model: %+v", model)
		}
		found[model.Name] = true
	}
	for _, want := range []string{chatModel, embedModel, rerankModel} {
		if !found[want] {
			return "", fmt.Errorf("%s is missing in %v", want, found)
		}
	}
	return fmt.Sprintf("%d models", len(list.Models)), nil
}

func (s *session) runningModels() ([]string, error) {
	ctx, cancel := bounded()
	defer cancel()
	answer, err := s.rpc.GetRunningModels(ctx, &protocol.GetRunningModelsRequest{})
	if err != nil {
		return nil, err
	}
	if err := success(answer); err != nil {
		return nil, err
	}
	list, err := decode[modelsJSON](answer.GetResponseJson())
	var names []string
	for _, model := range list.Models {
		names = append(names, model.Name)
	}
	return names, err
}

func (s *session) stopping(r *report) {
	r.check("UnloadModel", func() (string, error) {
		ctx, cancel := bounded()
		defer cancel()
		request := encode(object{"models": []string{chatModel}})
		answer, err := s.rpc.UnloadModel(ctx, &protocol.UnloadModelRequest{RequestJson: request})
		if err != nil {
			return "", err
		}
		if err := success(answer); err != nil {
			return "", err
		}
		names, err := s.runningModels()
		if err == nil && slices.Contains(names, chatModel) {
			err = fmt.Errorf("%s is still among %v", chatModel, names)
		}
		return answer.GetMessage(), err
	})
	simple(r, "DeleteModel", bounded, func(ctx context.Context) (coded, error) {
		return s.rpc.DeleteModel(ctx, &protocol.DeleteModelRequest{RequestJson: encode(object{"model": embedModel})})
	})
	simple(r, "UpgradeEngine", unbounded, func(ctx context.Context) (coded, error) {
		return s.rpc.UpgradeEngine(ctx, &protocol.UpgradeEngineRequest{})
	})
}

func (s *session) ending(r *report) {
	ctx, cancel := bounded()
	defer cancel()
	calls := map[string]func() (coded, error){
		"SetAuth": func() (coded, error) {
			return s.rpc.SetAuth(ctx, &protocol.SetAuthRequest{AuthType: "apikey", Credentials: map[string]string{"api_key": "x"}})
		},
		"ValidateAuth": func() (coded, error) { return s.rpc.ValidateAuth(ctx, &protocol.ValidateAuthRequest{}) },
		"RefreshAuth":  func() (coded, error) { return s.rpc.RefreshAuth(ctx, &protocol.RefreshAuthRequest{}) },
	}
	for _, name := range []string{"SetAuth", "ValidateAuth", "RefreshAuth"} {
		r.check(name, func() (string, error) { return refused(calls[name], 501) })
	}
	simple(r, "StopEngine", unbounded, func(ctx context.Context) (coded, error) {
		return s.rpc.StopEngine(ctx, &protocol.StopEngineRequest{})
	})
	r.check("GetOperateStatus when stopped", func() (string, error) { return s.operateStatus(0) })
	r.check("HealthCheck when stopped", func() (string, error) {
		ctx, cancel := bounded()
		defer cancel()
		return refused(func() (coded, error) { return s.rpc.HealthCheck(ctx, &protocol.HealthCheckRequest{}) }, 503)
	})
	simple(r, "StartEngine after StopEngine", unbounded, func(ctx context.Context) (coded, error) {
		return s.rpc.StartEngine(ctx, &protocol.StartEngineRequest{Mode: "daemon"})
	})
	r.check("chat after the restart", func() (string, error) { return s.chat(8) })
}

// refused makes a call that must come back with an error code in an OK answer.
func refused(call func() (coded, error), want int32) (string, error) {
	answer, err := call()
	if err != nil {
		return "", err
	}
	return failure(answer, want)
}

// allMethods sees that no method of the service was left out.
func (s *session) allMethods() (string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	service := protocol.ProviderService_ServiceDesc
	total := 0
	var missing []string
	expect := func(method string) {
		total++
		if !s.called["/"+service.ServiceName+"/"+method] {
			missing = append(missing, method)
		}
	}
	for _, method := range service.Methods {
		expect(method.MethodName)
	}
	for _, stream := range service.Streams {
		expect(stream.StreamName)
	}
	if len(missing) > 0 || total != 25 {
		return "", fmt.Errorf("%d methods, not called: %v", total, missing)
	}
	return "25 methods", nil
}

func (s *session) noErrors() (string, error) {
	if lines := s.logErrors(); len(lines) > 0 {
		return "", fmt.Errorf("%d lines, the first: %s", len(lines), clip(lines[0]))
	}
	if text := s.synced.String(); strings.Contains(text, "Traceback") {
		return "", fmt.Errorf("a traceback: %s", clip(text))
	}
	return "none", nil
}

// statusIs sees that a call ended with a gRPC status.
func statusIs(err error, want codes.Code) error {
	if got := status.Code(err); got != want {
		return fmt.Errorf("ended with %s, not %s: %w", got, want, err)
	}
	return nil
}
