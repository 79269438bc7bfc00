package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"slices"
	"time"

	"github.com/hashicorp/go-plugin"
)

const (
	// What an HTTP/2 client says first, with its empty settings.
	greeting  = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"
	alert     = 21 // the type of a TLS record that says why not
	localhost = "localhost"
)

// autoMTLS checks that the plugin serves TLS to its host only, as go-plugin's own plugins do.
func autoMTLS(r *report) {
	s := spawn(func(config *plugin.ClientConfig) { config.AutoMTLS = true })
	defer s.client.Kill()
	if !s.begin(r) {
		return
	}
	r.check("GetManifest", s.getManifest)
	r.check("the plugin's certificate", s.certificate)
	r.check("a second connection", func() (string, error) { return s.talks(s.config.TLSConfig) })
	r.check("a client without a certificate", func() (string, error) {
		return s.keptOut(func(config *tls.Config) error {
			config.Certificates = nil
			return nil
		})
	})
	r.check("a client with another certificate", func() (string, error) {
		return s.keptOut(func(config *tls.Config) (err error) {
			config.Certificates, err = lookalike(nil)
			return err
		})
	})
	r.check("a certificate signed by that of the host", func() (string, error) {
		return s.keptOut(func(config *tls.Config) (err error) {
			config.Certificates, err = lookalike(&config.Certificates[0])
			return err
		})
	})
	r.check("TLS 1.1", func() (string, error) {
		return s.keptOut(func(config *tls.Config) error {
			config.MinVersion, config.MaxVersion = tls.VersionTLS10, tls.VersionTLS11
			return nil
		})
	})
	r.check("a client without TLS", s.plaintext)
	r.check("connect and close", func() (string, error) {
		conn, err := s.dial()
		if err != nil {
			return "", err
		}
		return "", conn.Close()
	})
	r.check("ping after the other checks", s.ping)
	r.check("Kill", s.kill)
	r.check("no error in the host's log", s.noErrors)
}

// dial connects to the address of the handshake line.
func (s *session) dial() (net.Conn, error) {
	address := s.client.ReattachConfig().Addr
	conn, err := net.DialTimeout(address.Network(), address.String(), soon)
	if err != nil {
		return nil, err
	}
	return conn, conn.SetDeadline(time.Now().Add(soon))
}

// certificate looks at what the plugin shows, which the host's own configuration has verified.
func (s *session) certificate() (string, error) {
	conn, err := s.dial()
	if err != nil {
		return "", err
	}
	defer conn.Close()
	config := s.config.TLSConfig.Clone()
	config.NextProtos = []string{"http/1.1", "h2"}
	client := tls.Client(conn, config)
	if err := client.Handshake(); err != nil {
		return "", err
	}
	state := client.ConnectionState()
	if len(state.PeerCertificates) != 1 || state.NegotiatedProtocol != "h2" {
		return "", fmt.Errorf("%d certificates, protocol %q", len(state.PeerCertificates), state.NegotiatedProtocol)
	}
	shown := state.PeerCertificates[0]
	usages := []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	key, isECDSA := shown.PublicKey.(*ecdsa.PublicKey)
	switch {
	case shown.Subject.CommonName != localhost || !slices.Equal(shown.DNSNames, []string{localhost}):
		return "", fmt.Errorf("it is for %s and %v", shown.Subject, shown.DNSNames)
	case !shown.IsCA || !slices.Equal(shown.ExtKeyUsage, usages):
		return "", fmt.Errorf("CA %t, usages %v", shown.IsCA, shown.ExtKeyUsage)
	case !isECDSA || key.Curve != elliptic.P256():
		return "", fmt.Errorf("a key of another kind: %T", shown.PublicKey)
	case time.Since(shown.NotBefore) < 30*time.Second || time.Until(shown.NotAfter) < 365*24*time.Hour:
		return "", fmt.Errorf("it counts from %s to %s", shown.NotBefore, shown.NotAfter)
	}
	return fmt.Sprintf("%s, %s, serial %x", tls.VersionName(state.Version), key.Curve.Params().Name, shown.SerialNumber), nil
}

// talks sees that a client gets the server's settings, the first frame of HTTP/2.
func (s *session) talks(config *tls.Config) (string, error) {
	conn, err := s.dial()
	if err != nil {
		return "", err
	}
	defer conn.Close()
	config = config.Clone()
	config.NextProtos = []string{"h2"}
	client := tls.Client(conn, config)
	if _, err := io.WriteString(client, greeting); err != nil {
		return "", err
	}
	frame := make([]byte, 9)
	if _, err := io.ReadFull(client, frame); err != nil {
		return "", err
	}
	return fmt.Sprintf("a frame of type %d", frame[3]), nil
}

// keptOut sees that a client which is the host but for one change gets an error and not one byte.
func (s *session) keptOut(change func(*tls.Config) error) (string, error) {
	config := s.config.TLSConfig.Clone()
	if err := change(config); err != nil {
		return "", err
	}
	detail, err := s.talks(config)
	var network net.Error
	switch {
	case err == nil:
		return "", fmt.Errorf("it was let in: %s", detail)
	case errors.As(err, &network) && network.Timeout():
		return "", fmt.Errorf("it was left waiting: %w", err)
	}
	return err.Error(), nil
}

// plaintext sees that a client without TLS learns nothing: an alert at most.
func (s *session) plaintext() (string, error) {
	conn, err := s.dial()
	if err != nil {
		return "", err
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, greeting); err != nil {
		return "", err
	}
	answer, err := io.ReadAll(conn)
	var network net.Error
	switch {
	case errors.As(err, &network) && network.Timeout():
		return "", fmt.Errorf("it was left waiting: %w", err)
	case len(answer) > 0 && answer[0] != alert:
		return "", fmt.Errorf("it got an answer: %q", answer)
	}
	return fmt.Sprintf("%d bytes of an alert, then the end", len(answer)), nil
}

// lookalike makes a certificate with the names and the kind of key that go-plugin's own have; signed by itself, or
// by another one.
func lookalike(signer *tls.Certificate) ([]tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(time.Now().UnixNano()),
		Subject:               pkix.Name{CommonName: localhost, Organization: []string{"HashiCorp"}},
		DNSNames:              []string{localhost},
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		NotBefore:             time.Now().Add(-30 * time.Second),
		NotAfter:              time.Now().Add(time.Hour),
	}
	parent, signingKey := template, any(key)
	if signer != nil {
		if parent, err = x509.ParseCertificate(signer.Certificate[0]); err != nil {
			return nil, err
		}
		template.Subject.CommonName = "another host" // the same issuer and subject would make it one that signs itself
		signingKey = signer.PrivateKey
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signingKey)
	if err != nil {
		return nil, err
	}
	return []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}, nil
}
