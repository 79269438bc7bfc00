// Command conformance-host drives a plugin as an AOG host does, with the real go-plugin library, and reports
// what it saw: one JSON line on stdout for each check, the host's own log on stderr.
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
	{"errors", "wrong calls get the code that says what is wrong", wrongCalls},
	{"eight-services", "each of the eight services, of a plugin that has them all", allServices},
	{"kill-streaming", "Kill while a stream is running", killWhileStreaming},
	{"kill-starting", "Kill while the engine is starting", killWhileStarting},
	{"kill-idle", "Kill a plugin whose engine was never started", killIdle},
	{"sigint", "a terminal's SIGINT does not end a hosted plugin", sigint},
	{"stdio", "output on stdout after the handshake reaches the host and breaks nothing", stdio},
	{"tcp", "serving on a TCP port", tcp},
	{"automtls", "a host with AutoMTLS is served, and nobody else", autoMTLS},
	{"reattach", "a plugin that is served by hand (-server, -server-pid), in go-plugin's test mode", reattach},
	{"identity", "a plugin serves its own manifest whatever the working directory (-dir: another plugin's)", identity},
	{"broken-manifest", "a plugin whose plugin.yaml is wrong", brokenManifest},
	{"multiplex", "a host that asks for broker multiplexing is told that there is none", multiplex},
	{"socket-group", "a host that names the group of the socket", socketGroup},
	{"wrong-version", "a host that speaks another protocol version", wrongVersion},
	{"wrong-cookie", "a start by something that is not the host", wrongCookie},
	{"ollama", "the Ollama of somebody else at OLLAMA_HOST, in the flavours that config_ref names", ollama},
	{"ollama-managed", "an Ollama of the plugin's own, from InstallEngine to Kill", ollamaManaged},
	{"ollama-hold", "the same up to a stream without an end; say so, then wait for the plugin to be killed", ollamaHold},
	{"aog", "what the AOG server does to messages: -models, -pull", aog},
	{"hold", "start the engine and a stream, say so, then wait to be killed", hold},
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

// check runs one check and prints its outcome with the time that it took. The check's text tells what was seen.
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
