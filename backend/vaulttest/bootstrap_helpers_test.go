package vaulttest

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala/kaizalatest"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// site is a Vault with the engine at kaizala/, and an emulator of Kaizala.
type site struct {
	*Vault
	kaizala                      *kaizalatest.Server
	connectorID, connectorSecret string
}

// newSite mounts the engine and registers a connector with Kaizala, without
// configuring anything.
func newSite(t *testing.T, opts ...Option) *site {
	t.Helper()
	s := &site{Vault: Start(t, opts...), kaizala: kaizalatest.NewServer()}
	t.Cleanup(s.kaizala.Close)
	s.connectorID, s.connectorSecret = s.kaizala.RegisterConnector()
	s.MountEngine(t, "kaizala")
	return s
}

// configure writes the connector, with the defaults and these fields.
func (s *site) configure(t *testing.T, fields map[string]any) {
	t.Helper()
	all := map[string]any{
		"connector_id":     s.connectorID,
		"connector_secret": s.connectorSecret,
		"api_root":         s.kaizala.URL,
	}
	for name, value := range fields {
		all[name] = value
	}
	s.write(t, "kaizala/config", all)
}

// tenant writes a tenant with a refresh token of a user with the same name.
func (s *site) tenant(t *testing.T, name string, fields map[string]any) {
	t.Helper()
	all := map[string]any{"refresh_token": s.kaizala.GenerateUserToken(s.connectorID, name)}
	for name, value := range fields {
		all[name] = value
	}
	s.write(t, "kaizala/tenants/"+name, all)
}

func (s *site) write(t *testing.T, path string, data map[string]any) {
	t.Helper()
	_, err := s.Client.Logical().Write(path, data)
	require.NoError(t, err, "writing %s", path)
}

// put is write, and returns the answer.
func (s *site) put(t *testing.T, path string, data map[string]any) map[string]any {
	t.Helper()
	secret, err := s.Client.Logical().Write(path, data)
	require.NoError(t, err, "writing %s", path)
	require.NotNil(t, secret, "no answer of %s", path)
	return secret.Data
}

// read reads as root.
func (s *site) read(t *testing.T, path string) map[string]any {
	t.Helper()
	secret, err := s.Client.Logical().Read(path)
	require.NoError(t, err, "reading %s", path)
	require.NotNil(t, secret, "nothing at %s", path)
	return secret.Data
}

// request sends a request with a token and returns the status and the answer.
// A PATCH has the content type that Vault wants for it, and LIST is Vault's own
// method.
func (v *Vault) request(t *testing.T, token, method, path string, data map[string]any) (int, string) {
	t.Helper()
	body, err := json.Marshal(data)
	require.NoError(t, err)
	contentType := "application/json"
	if method == http.MethodPatch {
		contentType = "application/merge-patch+json"
	}
	return v.requestRaw(t, token, method, path, contentType, body)
}

func (v *Vault) requestRaw(t *testing.T, token, method, path, contentType string, body []byte) (int, string) {
	t.Helper()
	req, err := http.NewRequest(method, v.Addr+"/v1/"+path, bytes.NewReader(body))
	require.NoError(t, err)
	req.Header.Set("X-Vault-Token", token)
	req.Header.Set("Content-Type", contentType)
	resp, err := v.http.Do(req)
	require.NoError(t, err)
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	return resp.StatusCode, string(text)
}

// bootstrapFile is the path of a file below bootstrap/.
func bootstrapFile(t *testing.T, elem ...string) string {
	t.Helper()
	root, err := Root()
	require.NoError(t, err)
	return filepath.Join(append([]string{root, "bootstrap"}, elem...)...)
}

func fileText(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	require.NoError(t, err)
	return string(text)
}

// shippedPolicy writes bootstrap/policies/<name>.hcl as the policy of that name.
func (v *Vault) shippedPolicy(t *testing.T, name string) {
	t.Helper()
	v.Policy(t, name, fileText(t, bootstrapFile(t, "policies", name+".hcl")))
}

// secretsIn returns the secrets that a text has.
func secretsIn(text string, secrets ...string) (found []string) {
	for _, secret := range secrets {
		if secret != "" && strings.Contains(text, secret) {
			found = append(found, secret)
		}
	}
	return found
}

// newAuthServer starts an emulator of an authorization server of class A, on its own socket.
func newAuthServer(t *testing.T) *oauth2test.Server {
	t.Helper()
	server := oauth2test.New()
	server.Set(oauth2test.ClassA)
	listener := httptest.NewServer(server.Handler())
	t.Cleanup(listener.Close)
	server.SetURL(listener.URL)
	return server
}
