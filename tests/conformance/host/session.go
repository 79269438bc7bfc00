package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"time"

	"engineplugin.invalid/conformance/protocol"
	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-plugin"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"
)

const pluginKey = "provider"

// Seconds at rest, at the pace of this machine.
var (
	startTimeout = pace(10 * time.Second)
	unaryTimeout = pace(60 * time.Second)
	// What AOG calls without a deadline is bounded here by cancellation, which the plugin does not see coming.
	patience = pace(90 * time.Second)
	// go-plugin's own patience after Shutdown; then it sends SIGKILL.
	killLimit   = pace(2 * time.Second)
	streamLimit = pace(300 * time.Second)
	soon        = pace(5 * time.Second)
)

// slowness says how many times longer than at rest everything takes on this machine just now.
func slowness() float64 {
	factor, err := strconv.ParseFloat(os.Getenv("TEST_PACE"), 64)
	if err != nil {
		return 1
	}
	return max(1, factor)
}

func pace(atRest time.Duration) time.Duration {
	return time.Duration(slowness() * float64(atRest))
}

var handshake = plugin.HandshakeConfig{
	ProtocolVersion:  1,
	MagicCookieKey:   "AOG_PLUGIN",
	MagicCookieValue: "aog-provider-plugin-v1",
}

// providerPlugin makes the generated client from go-plugin's connection.
type providerPlugin struct {
	plugin.NetRPCUnsupportedPlugin
}

func (providerPlugin) GRPCServer(*plugin.GRPCBroker, *grpc.Server) error {
	return errors.New("this host serves no plugin")
}

func (providerPlugin) GRPCClient(_ context.Context, _ *plugin.GRPCBroker, conn *grpc.ClientConn) (any, error) {
	return protocol.NewProviderServiceClient(conn), nil
}

// A transcript is a writer that remembers; many goroutines write to it.
type transcript struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (t *transcript) Write(data []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.text.Write(data)
}

func (t *transcript) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.text.String()
}

// A session is one spawned plugin.
type session struct {
	client *plugin.Client
	config *plugin.ClientConfig
	cmd    *exec.Cmd
	rpc    protocol.ProviderServiceClient

	log    transcript // the host's log, which the plugin's stderr is part of
	stderr transcript // the plugin's stderr as it stands
	synced transcript // what came through GRPCStdio, both channels

	mu     sync.Mutex
	called map[string]bool
}

// spawn prepares a plugin as AOG does; `change` lets a scenario be another kind of host. Nothing is started yet.
func spawn(change func(*plugin.ClientConfig)) *session {
	s := &session{called: map[string]bool{}}
	s.cmd = exec.Command(executable)
	s.cmd.Dir = workingDir
	config := &plugin.ClientConfig{
		HandshakeConfig:  handshake,
		Plugins:          plugin.PluginSet{pluginKey: providerPlugin{}},
		Cmd:              s.cmd,
		AllowedProtocols: []plugin.Protocol{plugin.ProtocolGRPC},
		StartTimeout:     startTimeout,
		AutoMTLS:         automtls,
		Stderr:           &s.stderr,
		SyncStdout:       &s.synced,
		SyncStderr:       &s.synced,
		Logger: hclog.New(&hclog.LoggerOptions{
			Name:   "host",
			Level:  hclog.Debug,
			Output: io.MultiWriter(os.Stderr, &s.log),
		}),
		GRPCDialOptions: []grpc.DialOption{
			grpc.WithUnaryInterceptor(s.noteUnary),
			grpc.WithStreamInterceptor(s.noteStream),
		},
	}
	if change != nil {
		change(config)
	}
	s.config = config
	s.client = plugin.NewClient(config)
	return s
}

func (s *session) noteUnary(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn,
	invoke grpc.UnaryInvoker, options ...grpc.CallOption) error {
	s.note(method)
	return invoke(ctx, method, req, reply, conn, options...)
}

func (s *session) noteStream(ctx context.Context, desc *grpc.StreamDesc, conn *grpc.ClientConn, method string,
	open grpc.Streamer, options ...grpc.CallOption) (grpc.ClientStream, error) {
	s.note(method)
	return open(ctx, desc, conn, method, options...)
}

func (s *session) note(method string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.called[method] = true
}

// dispense starts the plugin and gets its client, which AOG allows ten seconds.
func (s *session) dispense() (string, error) {
	began := time.Now()
	connection, err := s.client.Client()
	if err != nil {
		return "", err
	}
	dispensed, err := connection.Dispense(pluginKey)
	if err != nil {
		return "", err
	}
	s.rpc = dispensed.(protocol.ProviderServiceClient)
	if elapsed := time.Since(began); elapsed > startTimeout {
		return "", fmt.Errorf("took %s", elapsed)
	}
	return fmt.Sprintf("pid %s, %s", s.client.ID(), s.client.ReattachConfig().Addr), nil
}

func (s *session) ping() (string, error) {
	connection, err := s.client.Client()
	if err != nil {
		return "", err
	}
	return "SERVING", connection.Ping()
}

// begin reports the start of the plugin; false when there is nothing to go on with.
func (s *session) begin(r *report) bool {
	return r.check("dispense", s.dispense) && r.check("ping", s.ping) && r.check("first GetManifest", s.getManifest)
}

// kill ends the plugin as AOG does and sees that it went by itself, with exit code 0 and no complaint.
func (s *session) kill() (string, error) {
	began := time.Now()
	if slowness() > 1 {
		s.askToEnd()
	}
	s.client.Kill()
	elapsed := time.Since(began)
	switch state := s.cmd.ProcessState; {
	case !s.client.Exited() || state == nil:
		return "", errors.New("the process has not exited")
	case strings.Contains(s.log.String(), "failed to exit gracefully"):
		return "", fmt.Errorf("the host had to kill it after %s", elapsed.Round(time.Millisecond))
	case elapsed >= killLimit:
		return "", fmt.Errorf("took %s", elapsed)
	case !state.Success() && slowness() > 2:
		return "cut itself off on a busy machine", nil
	case !state.Success():
		return "", fmt.Errorf("ended with %s", state)
	}
	return "exited by itself, code 0", nil
}

// askToEnd does what Kill does, where Kill's own two seconds are too short for a busy machine.
func (s *session) askToEnd() {
	connection, err := s.client.Client()
	if err != nil {
		return
	}
	served, ok := connection.(*plugin.GRPCClient)
	if !ok {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), killLimit)
	defer cancel()
	if served.Conn.Invoke(ctx, "/plugin.GRPCController/Shutdown", &emptypb.Empty{}, &emptypb.Empty{}) == nil {
		_ = s.waitExit(killLimit)
	}
}

// waitExit waits for the end of a process that go-plugin gave up on.
func (s *session) waitExit(limit time.Duration) error {
	return eventually(limit, "the plugin's process is still there", s.client.Exited)
}

// eventually polls a condition for things that bring no event.
func eventually(limit time.Duration, otherwise string, done func() bool) error {
	for deadline := time.Now().Add(limit); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if done() {
			return nil
		}
	}
	return errors.New(otherwise)
}

// logErrors are the lines of the host's log at level ERROR: AOG's operator would see them.
func (s *session) logErrors() []string {
	var lines []string
	for line := range strings.SplitSeq(s.log.String(), "\n") {
		if strings.Contains(line, "[ERROR]") {
			lines = append(lines, line)
		}
	}
	return lines
}
