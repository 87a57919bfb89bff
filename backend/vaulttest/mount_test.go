package vaulttest

import (
	"encoding/json"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala/kaizalatest"
)

// mount is the engine mounted on a real Vault, with its own emulator of Kaizala. Its
// requests are made over HTTP with one Vault token.
type mount struct {
	t       testing.TB
	vault   *Vault
	path    string
	token   string
	kaizala *kaizalatest.Server
	// The connector's ID and secret, as Kaizala's portal shows them.
	connectorID, connectorSecret string
	// heard has every answer so far, to requests with any token.
	heard *answers
}

// mountEngine mounts the registered engine. At the end of the test the emulator is
// closed first, and then the mount is disabled with its remaining leases: that has to
// work each time.
func mountEngine(t testing.TB, v *Vault, path string) mount {
	t.Helper()
	m := mount{t: t, vault: v, path: path, token: v.RootToken, kaizala: kaizalatest.NewServer(), heard: &answers{}}
	m.connectorID, m.connectorSecret = m.kaizala.RegisterConnector()
	v.Mount(t, path)
	t.Cleanup(func() {
		m.kaizala.Close()
		if !t.Failed() {
			require.NoError(t, v.Client.Sys().Unmount(path), "unmounting with Kaizala gone")
		}
	})
	return m
}

// configuredEngine is mountEngine with the connector written to config.
func configuredEngine(t testing.TB, v *Vault, path string) mount {
	t.Helper()
	m := mountEngine(t, v, path)
	m.write("config", m.connector()).ok(t)
	return m
}

// connector returns the fields of config for the connector on Kaizala's portal.
func (m mount) connector() fields {
	return fields{"connector_id": m.connectorID, "connector_secret": m.connectorSecret, "api_root": m.kaizala.URL}
}

// addTenant generates a refresh token for a user of the tenant's name, writes it
// and returns it.
func (m mount) addTenant(name string, with ...fields) string {
	m.t.Helper()
	token := m.kaizala.GenerateUserToken(m.connectorID, name)
	body := fields{"refresh_token": token}
	for _, more := range with {
		for field, value := range more {
			body[field] = value
		}
	}
	m.write("tenants/"+name, body).ok(m.t)
	return token
}

// as is the same mount with another Vault token.
func (m mount) as(token string) mount { m.token = token; return m }

// in is the same mount for a part of the test.
func (m mount) in(t testing.TB) mount { m.t = t; return m }

type fields map[string]any

func (m mount) read(path string) answer { return m.do(http.MethodGet, path, nil) }

func (m mount) write(path string, data fields) answer { return m.do(http.MethodPut, path, data) }

func (m mount) patch(path string, data fields) answer { return m.do(http.MethodPatch, path, data) }

func (m mount) delete(path string) answer { return m.do(http.MethodDelete, path, nil) }

func (m mount) list(path string) answer { return m.do("LIST", path, nil) }

// access reads the current access token without a lease.
func (m mount) access(tenant string) string {
	m.t.Helper()
	return m.read("token/" + tenant).ok(m.t).text("access_token")
}

func (m mount) do(method, path string, data fields) answer {
	return m.request(method, m.path+"/"+path, data, nil)
}

// sys makes a request to Vault itself.
func (m mount) sys(method, path string, data fields) answer {
	return m.request(method, path, data, nil)
}

func (m mount) request(method, path string, data fields, header http.Header) answer {
	m.t.Helper()
	var body string
	if data != nil {
		text, err := json.Marshal(data)
		require.NoError(m.t, err)
		body = string(text)
	}
	a, err := m.send(method, path, body, header)
	require.NoError(m.t, err, "%s %s", method, path)
	return a
}

// send makes a request whose body need not be JSON. err is an error of the network.
func (m mount) send(method, path, body string, header http.Header) (answer, error) {
	r, err := http.NewRequest(method, m.vault.Addr+"/v1/"+path, strings.NewReader(body))
	if err != nil {
		return answer{}, err
	}
	r.Header.Set("X-Vault-Token", m.token)
	r.Header.Set("X-Vault-Request", "true")
	if method == http.MethodPatch {
		r.Header.Set("Content-Type", "application/merge-patch+json")
	}
	for name, values := range header {
		r.Header[name] = values
	}
	resp, err := m.vault.http.Do(r)
	if err != nil {
		return answer{}, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return answer{}, err
	}
	a := answer{request: method + " " + path, status: resp.StatusCode, body: string(text)}
	m.heard.add(a)
	return a, nil
}

// answer is Vault's answer to a request.
type answer struct {
	request string
	status  int
	body    string
}

type answers struct {
	mu  sync.Mutex
	all []answer
}

func (l *answers) add(a answer) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all = append(l.all, a)
}

func (l *answers) list() []answer {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all[:len(l.all):len(l.all)]
}

// ok requires success.
func (a answer) ok(t testing.TB) answer {
	t.Helper()
	require.Less(t, a.status, 300, "%s: %s", a.request, a.body)
	return a
}

// refused requires a status, and a text in its error.
func (a answer) refused(t testing.TB, status int, texts ...string) {
	t.Helper()
	require.Equal(t, status, a.status, "%s: %s", a.request, a.body)
	for _, text := range texts {
		require.Contains(t, strings.Join(a.parsed().Errors, "\n"), text, "%s", a.request)
	}
}

func (a answer) parsed() (p struct {
	Data          map[string]any
	Warnings      []string
	Errors        []string
	LeaseID       string `json:"lease_id"`
	LeaseDuration int64  `json:"lease_duration"`
	Renewable     bool
	WrapInfo      api.SecretWrapInfo `json:"wrap_info"`
	Auth          api.SecretAuth
}) {
	_ = json.Unmarshal([]byte(a.body), &p)
	return p
}

func (a answer) data() map[string]any { return a.parsed().Data }

// text is a string of the answer's data.
func (a answer) text(field string) string {
	s, _ := a.data()[field].(string)
	return s
}

// number is a whole number of the answer's data.
func (a answer) number(field string) int64 {
	n, _ := a.data()[field].(float64)
	return int64(n)
}

func (a answer) lease() string { return a.parsed().LeaseID }

// ttl is the life of the answer's lease.
func (a answer) ttl() time.Duration { return time.Duration(a.parsed().LeaseDuration) * time.Second }

// time is a time of the answer's data, in the only form that the engine writes.
func (a answer) time(t testing.TB, field string) time.Time {
	t.Helper()
	require.Regexp(t, `Z$`, a.text(field), "%s is in UTC", field)
	at, err := time.Parse(time.RFC3339, a.text(field))
	require.NoError(t, err, field)
	return at
}

func (m mount) renew(lease string, increment time.Duration) answer {
	m.t.Helper()
	return m.sys(http.MethodPut, "sys/leases/renew", fields{"lease_id": lease, "increment": int(increment.Seconds())})
}

// revoke revokes a lease and waits until that is done.
func (m mount) revoke(lease string) {
	m.t.Helper()
	m.sys(http.MethodPut, "sys/leases/revoke", fields{"lease_id": lease, "sync": true}).ok(m.t)
}

// leases are the leases of the whole mount.
func (m mount) leases() (all []string) {
	m.t.Helper()
	var below func(prefix string)
	below = func(prefix string) {
		keys, _ := m.sys("LIST", "sys/leases/lookup/"+prefix, nil).data()["keys"].([]any)
		for _, key := range keys {
			if name := key.(string); strings.HasSuffix(name, "/") {
				below(prefix + name)
			} else {
				all = append(all, prefix+name)
			}
		}
	}
	below(m.path + "/")
	return all
}

// requireNoIrrevocableLeases checks all leases of Vault.
func requireNoIrrevocableLeases(t testing.TB, v *Vault) {
	t.Helper()
	secret, err := v.Client.Logical().ReadWithData("sys/leases/count", map[string][]string{"type": {"irrevocable"}})
	require.NoError(t, err)
	require.Equal(t, json.Number("0"), secret.Data["lease_count"])
}

// policyFile is one of the repository's policies.
func policyFile(t testing.TB, name string) string {
	t.Helper()
	root, err := Root()
	require.NoError(t, err)
	text, err := os.ReadFile(filepath.Join(root, "bootstrap", "policies", name+".hcl"))
	require.NoError(t, err)
	return string(text)
}
