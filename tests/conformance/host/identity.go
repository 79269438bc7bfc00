package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/hashicorp/go-plugin"
)

// identity runs the plugin with several working directories; -dir is a directory of another plugin. The plugin must
// always be the one that the executable belongs to, which its directory is named after.
func identity(r *report) {
	own := filepath.Base(filepath.Dir(filepath.Dir(filepath.Dir(executable))))
	other := filepath.Base(workingDir)
	if !r.check("another plugin's directory", func() (string, error) { return other, os.Chdir(workingDir) }) {
		return
	}
	for _, each := range []struct{ name, dir, override, want string }{
		{"Dir two above the executable", filepath.Dir(filepath.Dir(executable)), "", own},
		{"Dir unset, in another plugin", "", "", own},
		{"Dir in another plugin", filepath.Join(workingDir, "bin"), "", own},
		{"Dir is the root", "/", "", own},
		{"ENGINE_PLUGIN_DIR", "", workingDir, other},
	} {
		r.check(each.name, func() (string, error) { return serves(each.dir, each.override, each.want) })
	}
}

// serves spawns the plugin in a working directory and says which one it is.
func serves(dir, override, want string) (string, error) {
	s := spawn(func(config *plugin.ClientConfig) {
		config.Cmd.Dir = dir
		if override != "" {
			config.Cmd.Env = append(config.Cmd.Env, "ENGINE_PLUGIN_DIR="+override)
		}
	})
	defer s.client.Kill()
	if _, err := s.dispense(); err != nil {
		return "", err
	}
	name, err := s.getManifest()
	if err == nil && !strings.HasPrefix(name, want+" ") {
		err = fmt.Errorf("it serves %q instead of %s", name, want)
	}
	return name, err
}
