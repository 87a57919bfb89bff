package vaulttest

import (
	"io"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala/kaizalatest"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/oauth2/oauth2test"
)

// A step is a command of the runbook: the content of one fenced block.
type step struct {
	who    string // the person who runs it, from the comment in its first line
	script string
}

// runbook reads the steps from backend/README.md, by the bold title above them; the
// title of the first steps is "".
func runbook(t *testing.T) map[string][]step {
	t.Helper()
	text, _, found := strings.Cut(fileText(t, runbookFile(t)), "\n# Watching")
	require.True(t, found)
	require.LessOrEqual(t, len(regexp.MustCompile(`(?m)^.+$`).FindAllString(text, -1)), 150, "three screens of lines that are not empty")
	title := regexp.MustCompile(`(?m)^\*\*(.+?)\.\*\*`)
	block := regexp.MustCompile("(?ms)^```sh\n# ([^\n]+)\n(.*?)^```$")
	require.Equal(t, strings.Count(text, "\n```sh"), len(block.FindAllString(text, -1)), "each block begins with the person who runs it")

	steps := map[string][]step{}
	for _, at := range block.FindAllStringSubmatchIndex(text, -1) {
		name := ""
		if titles := title.FindAllStringSubmatch(text[:at[0]], -1); titles != nil {
			name = titles[len(titles)-1][1]
		}
		steps[name] = append(steps[name], step{who: text[at[2]:at[3]], script: text[at[4]:at[5]]})
	}
	return steps
}

func runbookFile(t *testing.T) string {
	t.Helper()
	root, err := Root()
	require.NoError(t, err)
	return filepath.Join(root, "backend", "README.md")
}

// badDay is one of the situations in the runbook.
type badDay struct {
	*site
	t      *testing.T
	dir    string            // the directory in which the steps are run
	tokens map[string]string // the Vault token of each person
	steps  []step
	env    []string
	server *oauth2test.Server // an authorization server that moveToOAuth has made
}

// moveToOAuth replaces the connector by one of an authorization server that can revoke access tokens, and returns the tenant's
// access token.
func (d *badDay) moveToOAuth() (accessToken string) {
	d.t.Helper()
	d.server = newAuthServer(d.t)
	callback := d.Addr + "/v1/kaizala/callback"
	id, secret := d.server.RegisterClient(oauth2test.AuthBasic, callback)
	remove := func() (err error) {
		for _, path := range []string{"tenants/acme", "config"} {
			_, err = d.Client.Logical().Delete("kaizala/" + path)
		}
		return err
	}
	require.NoError(d.t, remove())
	// The connector cannot be deleted before its revocations are made, which needs the server.
	d.t.Cleanup(func() {
		require.NoError(d.t, d.Client.Sys().RevokePrefix("kaizala/creds"))
		Eventually(d.t, "the last revocations", func() bool { return remove() == nil })
	})
	d.write(d.t, "kaizala/config", map[string]any{
		"service": "oauth2", "issuer": d.server.Issuer(), "connector_id": id, "connector_secret": secret, "redirect_uris": callback,
		"revocation": "access_token", "exchange_invalidates": false, "confirm": false, "exchanges_per_minute": 500,
	})
	d.write(d.t, "kaizala/tenants/acme", map[string]any{"refresh_token": d.server.Grant(id, "asha")})
	return d.token()
}

// next runs the next step, unchanged, with a text on standard input.
func (d *badDay) next(input string) string {
	d.t.Helper()
	return d.nextOn(d.Vault, d.tokens, input)
}

func (d *badDay) nextOn(v *Vault, tokens map[string]string, input string) string {
	d.t.Helper()
	require.NotEmpty(d.t, d.steps, "the runbook has no more steps")
	s := d.steps[0]
	d.steps = d.steps[1:]
	require.Contains(d.t, tokens, s.who)
	cmd := exec.Command("sh", "-c", s.script)
	cmd.Dir = d.dir
	cmd.Env = append(v.CLIEnv(tokens[s.who]), d.env...)
	cmd.Stdin = strings.NewReader(input)
	out, err := cmd.CombinedOutput()
	require.NoError(d.t, err, "%s\n%s", s.script, out)
	require.NotContains(d.t, string(out), "permission denied", s.script)
	return string(out)
}

func (d *badDay) status() any { return d.read(d.t, "kaizala/tenants/acme")["status"] }

// token returns the access token that readers get now.
func (d *badDay) token() string {
	return d.read(d.t, "kaizala/creds/acme")["access_token"].(string)
}

func (d *badDay) refresh() int {
	status, _ := d.request(d.t, d.RootToken, http.MethodPost, "kaizala/tenants/acme/refresh", nil)
	return status
}

func (d *badDay) leases() int {
	secret, err := d.Client.Logical().List("sys/leases/lookup/kaizala/creds/acme")
	require.NoError(d.t, err)
	if secret == nil {
		return 0
	}
	return len(secret.Data["keys"].([]any))
}

func (d *badDay) newRefreshToken() string {
	return d.kaizala.GenerateUserToken(d.connectorID, "acme")
}

var invalidToken = kaizalatest.Fault{
	Times: 1, Status: 401,
	Body: `{"message":"refused","errorCode":"InvalidToken","errorCategoryKey":"AuthException"}`,
}

// badDays are the situations by their titles in the runbook.
var badDays = map[string]func(*badDay){
	"": func(d *badDay) {
		out := d.next("")
		require.Regexp(d.t, `(?m)^acme +default .* ok$`, out)
		require.Regexp(d.t, `(?m)^refresh_token_expire_time +20`, out)
	},
	"429s": func(d *badDay) {
		d.configure(d.t, map[string]any{"exchanges_per_minute": 1})
		require.Equal(d.t, 429, d.refresh())
		d.next("")
		require.Equal(d.t, 200, d.refresh())
	},
	"A leaked access token": func(d *badDay) {
		leaked := d.token()
		require.Equal(d.t, leaked, d.token())
		require.Equal(d.t, 2, d.leases())
		ends := d.read(d.t, "kaizala/tenants/acme")["access_token_expire_time"].(string)
		out := d.next("")
		require.True(d.t, strings.HasPrefix(out, ends), "first the end of the leaked token: %s", out)
		require.Zero(d.t, d.leases())
		require.NotEqual(d.t, leaked, d.token())
		require.True(d.t, d.kaizala.AccessTokenAlive(leaked), "as the runbook says")
	},
	"A leaked refresh token": func(d *badDay) {
		leaked, token := d.kaizala.CurrentRefreshToken("acme"), d.token()
		d.next(d.newRefreshToken() + "\n")
		require.False(d.t, d.kaizala.RefreshTokenAlive(leaked))
		require.NotEqual(d.t, token, d.token())
		require.True(d.t, d.kaizala.AccessTokenAlive(token), "as the runbook says")
	},
	"A rejected tenant": func(d *badDay) {
		d.kaizala.Inject(invalidToken)
		require.Equal(d.t, 400, d.refresh())
		require.Equal(d.t, "rejected", d.status())
		d.next("")
		require.Equal(d.t, "ok", d.status())
	},
	// Both steps end with the URL that a person opens; other tests play the code flow.
	"A grant that was withdrawn": func(d *badDay) {
		token := d.moveToOAuth()
		d.server.Withdraw("asha")
		require.False(d.t, d.server.Alive(token))
		require.Equal(d.t, token, d.token(), "as the runbook says, Vault cannot know that the grant has ended")
		d.next("")
		require.Zero(d.t, d.leases())
		status, answer := d.request(d.t, d.RootToken, http.MethodGet, "kaizala/creds/acme", nil)
		require.Equal(d.t, 400, status, answer)
		require.Equal(d.t, "rejected", d.status())
		out := d.next("")
		url := regexp.MustCompile(`(?m)^authorization_url +(\S+)$`).FindStringSubmatch(out)
		require.NotNil(d.t, url, out)
		back, err := d.server.Approve(url[1], "asha")
		require.NoError(d.t, err)
		resp, err := d.http.Get(back)
		require.NoError(d.t, err)
		page, err := io.ReadAll(resp.Body)
		require.NoError(d.t, err)
		require.NoError(d.t, resp.Body.Close())
		require.Equal(d.t, 200, resp.StatusCode, "%s", page)
		require.Equal(d.t, "ok", d.status())
		require.True(d.t, d.server.Alive(d.token()))
	},
	"Revocations that are pending": func(d *badDay) {
		token := d.moveToOAuth()
		d.server.Inject(oauth2test.Fault{Endpoint: oauth2test.EndpointRevocation, Times: 2, Answer: oauth2test.Unavailable(0)})
		out := d.next("")
		require.False(d.t, d.server.Alive(token), out)
		require.Zero(d.t, d.leases())
		require.NotContains(d.t, d.read(d.t, "kaizala/config"), "pending_revocations")
	},
	"A connector's secret replaced": func(d *badDay) {
		token := d.token()
		secret := d.kaizala.NewConnectorSecret(d.connectorID)
		require.Equal(d.t, 400, d.refresh())
		require.Equal(d.t, token, d.token(), "usable tokens are handed out")
		require.Equal(d.t, "degraded", d.status())
		d.next(secret + "\n")
		require.Equal(d.t, 200, d.refresh())
	},
	"A lost Vault": func(d *badDay) {
		d.next("")
		info, err := os.Stat(filepath.Join(d.dir, "kaizala.snap"))
		require.NoError(d.t, err)
		require.Positive(d.t, info.Size())

		anew := Start(d.t)
		plugin := filepath.Join(anew.PluginDir, PluginName)
		content, err := os.ReadFile(PluginBinary(d.t))
		require.NoError(d.t, err)
		require.NoError(d.t, os.WriteFile(plugin, content, 0o755))
		d.env = []string{"KAIZALA_PLUGIN=" + plugin}
		out := d.nextOn(anew, map[string]string{"administrator of the new Vault": anew.RootToken}, "")
		require.Contains(d.t, out, "vault write kaizala/config")
		again := &site{Vault: anew, kaizala: d.kaizala, connectorID: d.connectorID, connectorSecret: d.connectorSecret}
		again.configure(d.t, nil)
		again.tenant(d.t, "acme", nil)
	},
	"Leases keep growing": func(d *badDay) {
		for range 4 {
			d.token()
		}
		require.Equal(d.t, 4, d.leases())
		out := d.next("")
		require.Regexp(d.t, `(?m)^lease_count +0$`, out)
		require.Zero(d.t, d.leases())
		secret, err := d.Client.Logical().Read("kaizala/creds/acme")
		require.NoError(d.t, err)
		require.Equal(d.t, 900, secret.LeaseDuration)
		require.True(d.t, secret.Renewable)
	},
	"From one connector to another": func(d *badDay) {
		d.token()
		id, secret := d.kaizala.RegisterConnector()
		d.env = []string{"CONNECTOR_ID=" + id}
		d.next(secret)
		d.write(d.t, "kaizala/config/hr", map[string]any{"api_root": d.kaizala.URL})
		d.next(d.kaizala.GenerateUserToken(id, "acme"))
		require.True(d.t, d.kaizala.AccessTokenAlive(d.token()))
		d.next("")
		out, exit := d.CLI(d.t, d.RootToken, "list", "kaizala/config")
		require.Zero(d.t, exit, out)
		require.Contains(d.t, out, "hr")
		require.NotContains(d.t, out, "default")
	},
	"An old snapshot restored": func(d *badDay) {
		d.tenant(d.t, "contoso", nil)
		out, exit := d.CLI(d.t, d.RootToken, "operator", "raft", "snapshot", "save", filepath.Join(d.dir, "kaizala.snap"))
		require.Zero(d.t, exit, out)
		d.write(d.t, "kaizala/tenants/acme", map[string]any{"refresh_token": d.newRefreshToken()})
		d.next("")
		Eventually(d.t, "the engine to be back", func() bool {
			secret, err := d.Client.Logical().Read("kaizala/tenants/acme")
			return err == nil && secret != nil
		})
		out = d.next("")
		require.Regexp(d.t, `(?m)^acme .* rejected$`, out)
		require.Regexp(d.t, `(?m)^contoso .* ok$`, out)
		d.write(d.t, "kaizala/tenants/acme", map[string]any{"refresh_token": d.newRefreshToken()})
		require.Equal(d.t, "ok", d.status())
	},
	"Another path for the mount": func(d *badDay) {
		d.moveToOAuth()
		d.write(d.t, "sys/quotas/rate-limit/kaizala-callback", map[string]any{"path": "kaizala/callback*", "rate": 60, "interval": "1m"})
		version := PluginVersion(d.t, PluginBinary(d.t))
		callback := d.Addr + "/v1/oauth/callback"
		d.env = []string{"KAIZALA_PLUGIN=" + filepath.Join(d.PluginDir, PluginName+"-"+version), "REDIRECT_URI=" + callback}
		d.t.Cleanup(func() {
			_, err := d.Client.Logical().Delete("sys/quotas/rate-limit/oauth-callback")
			require.NoError(d.t, err)
			_, err = d.Client.Sys().StartRemount("oauth", "kaizala")
			require.NoError(d.t, err)
			Eventually(d.t, "the move back", func() bool {
				mounts, err := d.Client.Sys().ListMounts()
				return err == nil && mounts["kaizala/"] != nil
			})
		})
		d.next("")
		require.Zero(d.t, d.leases())
		require.Equal(d.t, []any{callback}, d.read(d.t, "oauth/config")["redirect_uris"])
		require.Equal(d.t, "oauth/callback*", d.read(d.t, "sys/quotas/rate-limit/oauth-callback")["path"])
		status, answer := d.request(d.t, d.TokenWith(d.t, "oauth-app-acme"), http.MethodGet, "oauth/creds/acme", nil)
		require.Equal(d.t, 200, status, answer)
	},
	"Two mounts or clusters on one connector": func(d *badDay) {
		d.next("")
		require.EqualValues(d.t, "25", d.read(d.t, "kaizala/config")["exchanges_per_minute"])
	},
	// The storage of a real Vault cannot be made to fail here; the tests in process do
	// that. This test uses a tenant that is degraded for another reason.
	"Storage fails": func(d *badDay) {
		d.token()
		d.kaizala.Inject(kaizalatest.Fault{Status: 500})
		require.Equal(d.t, 503, d.refresh())
		require.Equal(d.t, "degraded", d.status())
		require.Regexp(d.t, `(?m)^acme .* degraded$`, d.next(""))
		d.kaizala.ClearFaults()
		d.next("")
		require.Equal(d.t, "ok", d.status())
	},
}

// Every step of the runbook, unchanged, on a Vault in the situation that it is for.
func TestRunbook(t *testing.T) {
	t.Parallel()
	steps := runbook(t)
	s := newSite(t, Raft(), WithConfig(func(config map[string]any) {
		config["telemetry"] = map[string]any{"prometheus_retention_time": "1h", "disable_hostname": true}
	}))
	for _, name := range []string{"operator", "tenant-user", "tenant-connect", "connector-owner"} {
		s.shippedPolicy(t, name)
	}
	s.Policy(t, "hr-owner", strings.ReplaceAll(fileText(t, bootstrapFile(t, "policies", "connector-owner.hcl")), "config/default", "config/hr"))
	tokens := map[string]string{
		"administrator":         s.RootToken,
		"operator":              s.TokenWith(t, "operator"),
		"tenant user":           s.TokenWith(t, "tenant-user", "tenant-connect"),
		"connector owner":       s.TokenWith(t, "connector-owner"),
		"owner of connector hr": s.TokenWith(t, "hr-owner"),
	}
	// In this order the 429s come early: few other calls have used the share then,
	// which does not start anew when the connector is configured again.
	for _, title := range slices.Sorted(maps.Keys(badDays)) {
		t.Run(title, func(t *testing.T) {
			here := &site{Vault: s.Vault, kaizala: s.kaizala}
			require.NoError(t, s.Client.Sys().RevokePrefix("kaizala/creds"))
			for _, path := range []string{"tenants/acme", "tenants/contoso", "config", "config/hr"} {
				_, err := s.Client.Logical().Delete("kaizala/" + path)
				require.NoError(t, err)
			}
			s.kaizala.ClearFaults()
			here.connectorID, here.connectorSecret = s.kaizala.RegisterConnector()
			here.configure(t, map[string]any{"exchanges_per_minute": 500})
			here.tenant(t, "acme", nil)
			d := &badDay{site: here, t: t, dir: t.TempDir(), tokens: tokens, steps: steps[title]}
			require.NoError(t, os.Symlink(bootstrapFile(t), filepath.Join(d.dir, "bootstrap")))
			badDays[title](d)
			require.Empty(t, d.steps, "steps that were not run")
		})
		delete(steps, title)
	}
	require.Empty(t, steps, "parts of the runbook without a test")

	t.Run("metrics", func(t *testing.T) {
		names := regexp.MustCompile("`(vault_[a-z_]+)").FindAllStringSubmatch(fileText(t, runbookFile(t)), -1)
		require.Len(t, names, 4)
		status, metrics := s.request(t, tokens["operator"], http.MethodGet, "sys/metrics?format=prometheus", nil)
		require.Equal(t, 200, status)
		for _, name := range names {
			require.True(t, strings.Contains(metrics, name[1]), name[1])
		}
		require.True(t, regexp.MustCompile(`vault_secret_lease_creation\{.*mount_point="kaizala/"`).MatchString(metrics))
		for _, operation := range []string{"create", "update", "list", "revoke"} {
			require.True(t, strings.Contains(metrics, "vault_route_"+operation+"_kaizala_"), operation)
		}
	})
	require.Empty(t, secretsIn(s.Logs(), s.kaizala.CurrentRefreshToken("acme")))
}

// The runbook lists the engine's log lines, all of them and no others.
func TestRunbookListsLogLines(t *testing.T) {
	t.Parallel()
	logged := map[string]string{}
	call := regexp.MustCompile(`\.(?:Logger|log)\(\)\.(\w+)\("([^"]+)"`)
	for _, path := range glob(t, filepath.Join(filepath.Dir(runbookFile(t)), "*.go")) {
		if strings.HasSuffix(path, "_test.go") {
			continue
		}
		for _, found := range call.FindAllStringSubmatch(fileText(t, path), -1) {
			logged[found[2]] = strings.ToLower(found[1])
		}
	}
	listed := map[string]string{}
	row := regexp.MustCompile("(?m)^\\| (info|warn|error) \\| `([^`]+)`")
	for _, found := range row.FindAllStringSubmatch(fileText(t, runbookFile(t)), -1) {
		listed[found[2]] = found[1]
	}
	require.Equal(t, logged, listed)
}
