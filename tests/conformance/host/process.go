package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"engineplugin.invalid/conformance/protocol"
	"github.com/hashicorp/go-plugin"
)

const (
	noise      = "conformance-noise"
	noiseBytes = 200_000
	holdLimit  = 120 * time.Second
)

// ready starts the engine and pulls the chat model, for scenarios that are about something else.
func (s *session) ready(r *report) bool {
	return simple(r, "StartEngine", unbounded, func(ctx context.Context) (coded, error) {
		return s.rpc.StartEngine(ctx, &protocol.StartEngineRequest{Mode: "daemon"})
	}) && r.check("PullModel", s.pullModel)
}

func killWhileStreaming(r *report) {
	s := spawn(nil)
	defer s.client.Kill()
	if !s.begin(r) || !s.ready(r) {
		return
	}
	ended := make(chan error, 1)
	if !r.check("first chunk", func() (string, error) { return s.keepStreaming(ended) }) {
		return
	}
	r.check("Kill", s.kill)
	r.check("the stream ends with an error", func() (string, error) { return endsWithError(ended) })
}

// endsWithError waits for the end of a stream whose plugin is gone.
func endsWithError(ended <-chan error) (string, error) {
	select {
	case err := <-ended:
		if errors.Is(err, io.EOF) {
			return "", errors.New("a clean end, as if the answer were whole")
		}
		return err.Error(), nil
	case <-time.After(soon):
		return "", errors.New("it hangs")
	}
}

// keepStreaming opens a long stream and goes on reading it; its end comes on `ended`, never nil.
func (s *session) keepStreaming(ended chan<- error) (string, error) {
	return s.keepReading(ended, func(ctx context.Context) (protocol.ProviderService_InvokeServiceStreamClient, error) {
		return s.openStream(ctx, longAnswer)
	})
}

// keepReading does so with any stream.
func (s *session) keepReading(ended chan<- error,
	open func(context.Context) (protocol.ProviderService_InvokeServiceStreamClient, error)) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), streamLimit)
	stream, err := open(ctx)
	if err == nil {
		var first *protocol.InvokeServiceStreamResponse
		if first, err = stream.Recv(); err == nil {
			err = success(first)
		}
	}
	if err != nil {
		cancel()
		return "", err
	}
	go func() {
		defer cancel()
		var err error
		for err == nil {
			var chunk *protocol.InvokeServiceStreamResponse
			// A plugin that was asked to stop before it is killed says so in a last message.
			if chunk, err = stream.Recv(); err == nil {
				err = success(chunk)
			}
		}
		ended <- err
	}()
	return "streaming", nil
}

func killWhileStarting(r *report) {
	s := spawn(nil)
	defer s.client.Kill()
	if !s.begin(r) || !s.ready(r) {
		return
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		ctx, cancel := bounded()
		defer cancel()
		_, _ = s.rpc.LoadModel(ctx, &protocol.LoadModelRequest{RequestJson: encode(object{"model": chatModel})})
	}()
	r.check("Kill while a model is loading", s.kill)
	<-ended
}

func killIdle(r *report) {
	s := spawn(nil)
	defer s.client.Kill()
	if s.begin(r) {
		r.check("Kill", s.kill)
		r.check("no error in the host's log", s.noErrors)
	}
}

func sigint(r *report) {
	s := spawn(nil)
	defer s.client.Kill()
	if !s.begin(r) {
		return
	}
	r.check("SIGINT twice", func() (string, error) {
		for range 2 {
			if err := s.cmd.Process.Signal(os.Interrupt); err != nil {
				return "", err
			}
			if detail, err := s.ping(); err != nil {
				return detail, err
			}
		}
		return "still SERVING", nil
	})
	r.check("a call after SIGINT", s.getManifest)
	r.check("Kill", s.kill)
}

// stdio is run with a plugin that the test makes noisy: it writes to its stdout once that was redirected.
func stdio(r *report) {
	s := spawn(nil)
	defer s.client.Kill()
	if !s.begin(r) {
		return
	}
	r.check("the output on stdout arrives", func() (string, error) {
		count := func() int { return strings.Count(s.synced.String()+s.stderr.String(), noise) }
		err := eventually(startTimeout, "it never came", func() bool { return count()*len(noise) >= noiseBytes })
		return fmt.Sprintf("%d bytes of it", count()*len(noise)), err
	})
	r.check("a call after the output", s.getManifest)
	r.check("Kill", s.kill)
}

func tcp(r *report) {
	if err := os.Setenv("ENGINE_PLUGIN_TRANSPORT", "tcp"); err != nil {
		panic(err) // the name is a constant without a fault
	}
	s := spawn(func(config *plugin.ClientConfig) { config.MinPort, config.MaxPort = 20000, 20999 })
	defer s.client.Kill()
	if !s.begin(r) {
		return
	}
	r.check("address", func() (string, error) {
		address := s.client.ReattachConfig().Addr
		if address.Network() != "tcp" || !strings.HasPrefix(address.String(), "127.0.0.1:20") {
			return "", fmt.Errorf("%s %s", address.Network(), address)
		}
		return address.String(), nil
	})
	r.check("GetManifest", s.getManifest)
	r.check("Kill", s.kill)
}

// brokenManifest is run with a plugin whose plugin.yaml the test has damaged. The host's user sees only the host's log.
func brokenManifest(r *report) {
	s := spawn(nil)
	defer s.client.Kill()
	if s.refuses(r, "Failed to read any lines from plugin's stdout") {
		r.check("the host's log names the file", func() (string, error) { return s.logged("plugin.yaml:") })
	}
}

// logged finds the ERROR line of the host's log that holds a text.
func (s *session) logged(text string) (string, error) {
	for _, line := range s.logErrors() {
		if at := strings.Index(line, text); at >= 0 {
			return clip(line[at:]), nil
		}
	}
	return "", fmt.Errorf("no ERROR line with %q in the host's log: %s", text, clip(s.log.String()))
}

func multiplex(r *report) {
	s := spawn(func(config *plugin.ClientConfig) { config.GRPCBrokerMultiplex = true })
	defer s.client.Kill()
	s.refuses(r, plugin.ErrGRPCBrokerMuxNotSupported.Error())
}

func socketGroup(r *report) {
	group := strconv.Itoa(os.Getgid())
	s := spawn(func(config *plugin.ClientConfig) { config.UnixSocketConfig = &plugin.UnixSocketConfig{Group: group} })
	defer s.client.Kill()
	if !s.begin(r) {
		return
	}
	r.check("mode of the socket", func() (string, error) {
		info, err := os.Stat(s.client.ReattachConfig().Addr.String())
		if err != nil {
			return "", err
		}
		if info.Mode().Perm() != 0o660 {
			return "", fmt.Errorf("mode %o", info.Mode().Perm())
		}
		return "0660", nil
	})
	r.check("Kill", s.kill)
}

func wrongVersion(r *report) {
	s := spawn(func(config *plugin.ClientConfig) {
		config.ProtocolVersion = 2
		config.Plugins = nil
		config.VersionedPlugins = map[int]plugin.PluginSet{2: {pluginKey: providerPlugin{}}}
	})
	defer s.client.Kill()
	s.refuses(r, "incompatible API version")
}

func wrongCookie(r *report) {
	s := spawn(func(config *plugin.ClientConfig) { config.MagicCookieValue = "something-else" })
	defer s.client.Kill()
	if !s.refuses(r, "Failed to read any lines from plugin's stdout") {
		return
	}
	r.check("exit code and message on stderr", func() (string, error) {
		if code := s.cmd.ProcessState.ExitCode(); code != 1 {
			return "", fmt.Errorf("ended with %s", s.cmd.ProcessState)
		}
		if text := s.stderr.String(); !strings.Contains(text, "plugin") {
			return "", fmt.Errorf("stderr says %q", text)
		}
		return clip(strings.TrimSpace(s.stderr.String())), nil
	})
}

// refuses sees that the host gives up at the start with the wanted words, and that the process is gone then.
func (s *session) refuses(r *report, want string) bool {
	return r.check("the host reports the cause", func() (string, error) {
		_, err := s.client.Client()
		if err == nil || !strings.Contains(err.Error(), want) {
			return "", fmt.Errorf("%q does not hold %q", fmt.Sprint(err), want)
		}
		return want, s.waitExit(soon)
	})
}

// hold leaves everything running for a test that kills this host.
func hold(r *report) {
	s := spawn(nil)
	defer s.client.Kill()
	ended := make(chan error, 1)
	if !s.begin(r) || !s.ready(r) {
		return
	}
	if !r.check("holding", func() (string, error) { return s.keepStreaming(ended) }) {
		return
	}
	time.Sleep(holdLimit)
}
