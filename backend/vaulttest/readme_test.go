package vaulttest

import (
	"bufio"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala/kaizalatest"
	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/vaulttest/browser"
)

// The README's commands, unchanged and in its order, do what it says: on an empty
// Vault, in a copy of this tree that is like a fresh clone. Before the upgrade the
// copy gets a newer version, as with a newer tag. Other tests run the demos, and
// make test is not run here.
func TestReadme(t *testing.T) {
	root, err := Root()
	require.NoError(t, err)
	blocks := readmeBlocks(t, filepath.Join(root, "README.md"))
	checkout := t.TempDir()
	copyTree(t, root, checkout)

	v := Start(t)
	callback := v.Addr + "/v1/kaizala/callback"
	service := StartZitadel(t, "REDIRECT_URIS="+callback)
	kaizala := kaizalatest.NewServer()
	t.Cleanup(kaizala.Close)
	id, secret := kaizala.RegisterConnector()
	for name, text := range map[string]string{
		"client-secret":    service.ClientSecret,
		"connector-secret": secret,
		"refresh-token":    kaizala.GenerateUserToken(id, "asha"),
	} {
		require.NoError(t, os.WriteFile(filepath.Join(checkout, name), []byte(text), 0o600))
	}
	command := func(commands string, env ...string) *exec.Cmd {
		require.NotEmpty(t, commands)
		cmd := exec.Command("sh", "-ec", commands)
		cmd.Dir = checkout
		// The vault command has its own home directory; make build uses this user's caches.
		cmd.Env = slices.Concat(v.CLIEnv(v.RootToken), goEnv(t), []string{
			"PLUGIN_DIRECTORY=" + v.PluginDir, "ISSUER=" + service.Issuer, "REDIRECT_URI=" + callback,
			"CLIENT_ID=" + service.ClientID, "CONNECTOR_ID=" + id, "KAIZALA_NO_BROWSER=1",
		}, env)
		return cmd
	}
	paste := func(commands string, env ...string) string {
		t.Helper()
		out, err := command(commands, env...).CombinedOutput()
		require.NoError(t, err, "%s\n%s", commands, out)
		return string(out)
	}
	running := func() string {
		t.Helper()
		secret, err := v.Client.Logical().Read("sys/mounts/kaizala")
		require.NoError(t, err)
		return secret.Data["running_plugin_version"].(string)
	}

	install := regexp.MustCompile(`(?s)^(.*)(vault secrets enable[^\n]*\n)$`).FindStringSubmatch(blocks["Install it on your own Vault"])
	require.NotNil(t, install)
	paste(install[1]+install[2], "VERSION=v0.9.1")
	require.Equal(t, "v0.9.1", running())

	out := connects(t, command(blocks["**An OAuth 2.0 service.**"]), service)
	token := readField(t, out, "access_token")
	status, subject := service.Userinfo(t, token)
	require.Equal(t, 200, status)
	require.Equal(t, service.User, subject)

	// The README's Kaizala is the real service, which does not exist any more: the test uses the emulator.
	_, err = v.Client.Logical().Write("kaizala/config/kaizala", map[string]any{"connector_id": id, "connector_secret": secret, "api_root": kaizala.URL})
	require.NoError(t, err)
	readField(t, paste(blocks["**Kaizala**"]), "access_token")
	assert.Equal(t, 1, kaizala.Exchanges("asha"))

	paste(install[1], "VERSION=v0.9.2")
	paste(blocks["Upgrade"])
	require.Equal(t, "v0.9.2", running())
	assert.Equal(t, token, readField(t, paste("vault read kaizala/creds/acme"), "access_token"), "the access token lives on")
	paste("vault read kaizala/creds/sales")
	assert.Equal(t, 1, kaizala.Exchanges("asha"), "no further exchange")

	// The pin keeps the mount at the older version, which ran before.
	paste("vault write sys/plugins/pins/secret/vault-plugin-secrets-kaizala version=v0.9.1 && vault plugin reload -type=secret -plugin=vault-plugin-secrets-kaizala")
	require.Equal(t, "v0.9.1", running())
	paste(blocks["**Where a version is pinned**"])
	require.Equal(t, "v0.9.2", running())

	paste(blocks["The [recipes' page]"])
	assert.NotEqual(t, token, readField(t, paste("vault read kaizala/creds/acme"), "access_token"))
	leases, err := v.Client.Logical().List("sys/leases/lookup/kaizala/creds/acme")
	require.NoError(t, err)
	require.NotNil(t, leases)
	assert.Len(t, leases.Data["keys"], 1, "every older lease has ended")
}

// connects runs commands, one of which is connect.sh, and returns their output. While connect.sh waits, the person opens the
// address that it shows.
func connects(t *testing.T, commands *exec.Cmd, service *AuthServer) string {
	t.Helper()
	shown, err := commands.StderrPipe()
	require.NoError(t, err)
	var out strings.Builder
	commands.Stdout = &out
	require.NoError(t, commands.Start())
	lines := bufio.NewScanner(shown)
	var said []string
	for lines.Scan() {
		said = append(said, lines.Text())
		if strings.HasPrefix(lines.Text(), service.Issuer) {
			person := browser.Person{User: service.User, Password: service.Password}
			visit, err := person.Open(lines.Text())
			require.NoError(t, err)
			assert.Contains(t, visit.Last().Text(), "The tenant is connected")
		}
	}
	require.NoError(t, commands.Wait(), "%s\n%s", out.String(), strings.Join(said, "\n"))
	return out.String()
}

// readmeBlocks returns the shell commands of a document, by the last title above them: a heading, or bold words or a link at the
// start of a paragraph.
func readmeBlocks(t *testing.T, path string) map[string]string {
	t.Helper()
	blocks := map[string]string{}
	var title string
	for _, m := range regexp.MustCompile("(?ms)^## ([^\n]+)$|^(\\*\\*[^*\n]+\\*\\*|The \\[[^\\]]+\\])|^```sh\n(.*?)^```$").FindAllStringSubmatch(fileText(t, path), -1) {
		switch {
		case m[1] != "":
			title = m[1]
		case m[2] != "":
			title = m[2]
		default:
			blocks[title] += m[3]
		}
	}
	return blocks
}

// copyTree copies the files of a clone, without build results and Git's own files.
func copyTree(t *testing.T, from, to string) {
	t.Helper()
	require.NoError(t, filepath.WalkDir(from, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		if rel == ".git" || rel == "bin" || rel == "dist" {
			if entry.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		target := filepath.Join(to, rel)
		info, err := entry.Info()
		switch {
		case err != nil:
			return err
		case entry.IsDir():
			return os.MkdirAll(target, 0o755)
		case !entry.Type().IsRegular():
			return nil
		}
		source, err := os.Open(path)
		if err != nil {
			return err
		}
		defer source.Close()
		copied, err := os.OpenFile(target, os.O_CREATE|os.O_WRONLY, info.Mode().Perm())
		if err != nil {
			return err
		}
		_, err = io.Copy(copied, source)
		return errors.Join(err, copied.Close())
	}))
}

// goEnv is the environment with this user's Go caches of downloads and builds.
func goEnv(t *testing.T) (env []string) {
	t.Helper()
	out, err := exec.Command("go", "env", "-json", "GOCACHE", "GOMODCACHE", "GOENV").Output()
	require.NoError(t, err)
	var values map[string]string
	require.NoError(t, json.Unmarshal(out, &values))
	for name, value := range values {
		env = append(env, name+"="+value)
	}
	return env
}

// readField returns a field of a table that vault prints.
func readField(t *testing.T, table, name string) string {
	t.Helper()
	m := regexp.MustCompile(`(?m)^` + name + ` +(\S+)`).FindStringSubmatch(table)
	require.NotNil(t, m, "%s in:\n%s", name, table)
	return m[1]
}
