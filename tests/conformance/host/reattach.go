package main

import (
	"errors"
	"fmt"
	"net"

	"github.com/hashicorp/go-plugin"
)

// reattach is run with a plugin that the test serves by hand, which a host of go-plugin's test mode must not end.
func reattach(r *report) {
	address := &net.UnixAddr{Name: server, Net: "unix"}
	attach := func() *session {
		return spawn(func(config *plugin.ClientConfig) {
			config.Cmd = nil
			config.Reattach = &plugin.ReattachConfig{
				Protocol:        plugin.ProtocolGRPC,
				ProtocolVersion: int(handshake.ProtocolVersion),
				Addr:            address,
				Pid:             serverPid,
				Test:            true,
			}
		})
	}
	for _, turn := range []string{"", " again"} {
		s := attach()
		if !r.check("dispense"+turn, s.dispense) {
			return
		}
		r.check("ping"+turn, s.ping)
		r.check("GetManifest"+turn, s.getManifest)
		r.check("Kill does not end the plugin"+turn, func() (string, error) {
			s.client.Kill()
			if s.client.Exited() {
				return "", errors.New("the plugin has exited")
			}
			conn, err := net.Dial(address.Network(), address.String())
			if err != nil {
				return "", err
			}
			return fmt.Sprintf("pid %d still serves", serverPid), conn.Close()
		})
	}
}
