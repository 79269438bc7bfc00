// Command conformance-host drives a plugin as an AOG host does, with the real go-plugin library, and reports
// the outcome: one JSON line on stdout for each check, the host's own log on stderr.
//
//	conformance-host -plugin <dir>/bin/<platform>/<executable> -scenario lifecycle
//
// It exits 1 when a check fails and 2 when it cannot run at all.
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// A scenario is a group of checks that share what they start.
type scenario struct {
	name  string
	about string
	run   func(*report)
}

// Set by the flags.
var (
	executable string
	workingDir string
	automtls   bool
	server     string
	serverPid  int
	pullable   string
	models     = map[string]string{} // by service
)

var scenarios = []scenario{
	{"lifecycle", "all 25 methods, then Kill", lifecycle},
	{"errors", "invalid calls get the right error codes", wrongCalls},
	{"eight-services", "each of the eight services", allServices},
	{"kill-streaming", "Kill while a stream is running", killWhileStreaming},
	{"kill-starting", "Kill while the engine is starting", killWhileStarting},
	{"kill-idle", "Kill a plugin whose engine was never started", killIdle},
	{"sigint", "a terminal's SIGINT does not end a hosted plugin", sigint},
	{"stdio", "output on stdout after the handshake reaches the host", stdio},
	{"tcp", "serving on a TCP port", tcp},
	{"automtls", "only the host is served under AutoMTLS", autoMTLS},
	{"reattach", "a plugin under engine-plugin serve (-server, -server-pid), in go-plugin's test mode", reattach},
	{"identity", "a plugin serves its own manifest in any working directory (-dir: another plugin's)", identity},
	{"broken-manifest", "a plugin whose plugin.yaml is invalid", brokenManifest},
	{"multiplex", "a host that asks for broker multiplexing, which the plugin does not support", multiplex},
	{"socket-group", "a host that names the group of the socket", socketGroup},
	{"wrong-version", "a host with another protocol version", wrongVersion},
	{"wrong-cookie", "a start without the magic cookie", wrongCookie},
	{"ollama", "an attached Ollama at OLLAMA_HOST, in the flavors that config_ref names", ollama},
	{"ollama-managed", "a managed Ollama, from InstallEngine to Kill", ollamaManaged},
	{"ollama-hold", "the same up to an endless stream; report it, then wait until the plugin is killed", ollamaHold},
	{"aog", "the AOG server's changes to messages: -models, -pull", aog},
	{"hold", "start the engine and a stream, report it, then wait to be killed", hold},
}

func main() {
	name := flag.String("scenario", "lifecycle", "the checks to run; `list` prints their names")
	flag.StringVar(&executable, "plugin", "", "the plugin's `executable`")
	flag.StringVar(&workingDir, "dir", "", "working `directory` of the plugin (default: two above the executable, as AOG has it)")
	flag.BoolVar(&automtls, "automtls", false, "be a host with AutoMTLS")
	flag.StringVar(&server, "server", "", "the unix socket's `path` of a plugin that is served by hand")
	flag.IntVar(&serverPid, "server-pid", 0, "the `pid` of that plugin")
	flag.StringVar(&pullable, "pull", "", "a model's `reference` to pull and to call by (aog)")
	flag.Func("models", "the models to call, as `service=model,…` (aog)", func(text string) error {
		for pair := range strings.SplitSeq(text, ",") {
			service, model, found := strings.Cut(pair, "=")
			if !found {
				return fmt.Errorf("%q has no model", pair)
			}
			models[service] = model
		}
		return nil
	})
	flag.Parse()
	if *name == "list" {
		for _, each := range scenarios {
			fmt.Printf("%-18s%s\n", each.name, each.about)
		}
		return
	}
	if executable == "" || flag.NArg() != 0 {
		flag.Usage()
		os.Exit(2)
	}
	if workingDir == "" {
		workingDir = filepath.Dir(filepath.Dir(executable))
	}
	for _, each := range scenarios {
		if each.name == *name {
			os.Exit(runScenario(each))
		}
	}
	fmt.Fprintf(os.Stderr, "no scenario is called %q; -scenario list names them\n", *name)
	os.Exit(2)
}

func runScenario(chosen scenario) int {
	results := &report{scenario: chosen.name}
	if automtls {
		results.scenario += " tls"
	}
	chosen.run(results)
	if results.checks == 0 || results.failures > 0 {
		return 1
	}
	return 0
}

// A report prints the outcome of each check as it ends.
type report struct {
	scenario string
	checks   int
	failures int
}

type outcome struct {
	Scenario string  `json:"scenario"`
	Name     string  `json:"name"`
	OK       bool    `json:"ok"`
	Detail   string  `json:"detail"`
	Millis   float64 `json:"millis"`
}

// check runs one check and prints its outcome with the time that it took. The text that run returns describes the observation.
func (r *report) check(name string, run func() (string, error)) bool {
	began := time.Now()
	detail, err := run()
	result := outcome{
		Scenario: r.scenario,
		Name:     name,
		OK:       err == nil,
		Detail:   detail,
		Millis:   float64(time.Since(began).Microseconds()) / 1000,
	}
	if err != nil {
		result.Detail = err.Error()
		r.failures++
	}
	r.checks++
	line, err := json.Marshal(result)
	if err != nil {
		panic(err) // strings, a bool and a finite number always marshal
	}
	fmt.Println(string(line))
	return result.OK
}
