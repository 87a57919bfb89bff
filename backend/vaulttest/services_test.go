package vaulttest

import (
	"encoding/json"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// Each recipe is written to a real Vault with the commands of its page, and read back. An authorization can start then. None of
// these writes makes a call.
func TestServiceRecipesOnVault(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	files := glob(t, bootstrapFile(t, "services", "*.json"))
	require.Len(t, files, 16)
	dir := t.TempDir()
	require.NoError(t, os.Symlink(bootstrapFile(t), filepath.Join(dir, "bootstrap")))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "client-secret"), []byte("a-secret"), 0o600))
	paste := func(commands, redirectURI string) {
		t.Helper()
		cmd := exec.Command("sh", "-ec", commands)
		cmd.Dir = dir
		cmd.Env = append(s.CLIEnv(s.RootToken), "CLIENT_ID=an-id", "REDIRECT_URI="+redirectURI)
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "%s\n%s", commands, out)
	}
	// authorizes starts an authorization, whose URL names the redirect URI.
	authorizes := func(connector, redirectURI string) {
		t.Helper()
		started := s.put(t, "kaizala/tenants/acme/authorize", map[string]any{"connector": connector})
		address, err := url.Parse(started["authorization_url"].(string))
		require.NoError(t, err)
		require.Equal(t, redirectURI, address.Query().Get("redirect_uri"), connector)
	}
	const callback = "https://vault.example/v1/kaizala/callback"

	// The README's command, in place of the first of its block.
	root, err := Root()
	require.NoError(t, err)
	readme := filepath.Join(root, "README.md")
	block := readmeBlocks(t, readme)["**An OAuth 2.0 service.**"]
	lines := strings.SplitAfter(block, "\n")
	require.Contains(t, lines[1], "connector_secret=@client-secret")
	inPlace := regexp.MustCompile("`(vault write [^`]*google.json[^`]*)`").FindStringSubmatch(fileText(t, readme))
	require.NotNil(t, inPlace)
	paste(inPlace[1]+"\n"+lines[1], callback)
	authorizes("default", callback)

	commands := readmeBlocks(t, bootstrapFile(t, "services", "README.md"))[""]
	require.Contains(t, commands, "google")
	for _, file := range files {
		name := strings.TrimSuffix(filepath.Base(file), ".json")
		paste(strings.ReplaceAll(commands, "google", name), callback+"/"+name)
		raw, err := os.ReadFile(file)
		require.NoError(t, err)
		want := map[string]any{}
		require.NoError(t, json.Unmarshal(raw, &want))
		shown := s.read(t, "kaizala/config/"+name)
		for field, value := range want {
			if text, ok := value.(string); ok && !strings.HasSuffix(field, "_life") && field != "keep_alive" {
				assert.Equal(t, text, shown[field], "%s of %s", field, name)
			}
			assert.Contains(t, shown, field, name)
		}
		assert.Equal(t, "an-id", shown["connector_id"])
		assert.NotContains(t, shown, "connector_secret")
		authorizes(name, callback+"/"+name)
	}
}
