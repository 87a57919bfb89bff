package vaulttest

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala/kaizalatest"
)

// The README's commands do what it says, pasted as they stand in its order: on
// an empty Vault, from a checkout in which the version has moved on before the
// upgrade. make demo and make test are others' to run.
func TestReadme(t *testing.T) {
	root, err := Root()
	require.NoError(t, err)
	blocks := map[string]string{}
	var title string
	for _, m := range regexp.MustCompile("(?ms)^## ([^\n]+)$|^(\\*\\*[^*]+\\*\\*)|^```sh\n(.*?)^```$").FindAllStringSubmatch(fileText(t, filepath.Join(root, "README.md")), -1) {
		switch {
		case m[1] != "":
			title = m[1]
		case m[2] != "":
			title = m[2]
		default:
			blocks[title] += m[3]
		}
	}

	kaizala := kaizalatest.NewServer()
	t.Cleanup(kaizala.Close)
	id, secret := kaizala.RegisterConnector()
	v := Start(t)

	// The commands are run in a checkout of their own, whose make build makes
	// what the version is that is asked for.
	checkout := t.TempDir()
	bin := filepath.Join(checkout, "path")
	require.NoError(t, os.MkdirAll(bin, 0o755))
	require.NoError(t, os.MkdirAll(filepath.Join(checkout, "bin"), 0o755))
	require.NoError(t, os.Symlink(VaultBinary(t), filepath.Join(bin, "vault")))
	makefile := "build:\n\tcp $(BUILT) bin/vault-plugin-secrets-kaizala\n"
	require.NoError(t, os.WriteFile(filepath.Join(checkout, "Makefile"), []byte(makefile), 0o644))
	require.NoError(t, os.WriteFile(filepath.Join(checkout, "connector-secret"), []byte(secret), 0o600))
	require.NoError(t, os.WriteFile(filepath.Join(checkout, "refresh-token"), []byte(kaizala.GenerateUserToken(id, "asha")), 0o600))
	paste := func(built, commands string) string {
		require.NotEmpty(t, commands)
		cmd := exec.Command("sh", "-ec", commands)
		cmd.Dir = checkout
		cmd.Env = append(v.CLIEnv(v.RootToken),
			"PATH="+bin+":"+os.Getenv("PATH"), "BUILT="+built,
			"PLUGIN_DIRECTORY="+v.PluginDir, "CONNECTOR_ID="+id)
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "%s\n%s", commands, out)
		return string(out)
	}

	install := regexp.MustCompile(`(?s)^(.*secrets enable[^\n]*\n)(.*)$`).FindStringSubmatch(blocks["Install it on your own Vault"])
	require.NotNil(t, install)
	paste(BuildPlugin(t, "v0.1.1"), install[1])
	// The README's Kaizala is the real one, which has gone.
	_, err = v.Client.Logical().Write("kaizala/config", map[string]any{"connector_id": id, "connector_secret": secret, "api_root": kaizala.URL})
	require.NoError(t, err)
	out := paste("", install[2])
	assert.Regexp(t, `(?m)^access_token +\S`, out)
	assert.Equal(t, 1, kaizala.Exchanges("asha"))

	paste(BuildPlugin(t, "v0.1.2"), blocks["**Upgrade**"])
	out, status := v.CLI(t, v.RootToken, "secrets", "list", "-detailed")
	require.Zero(t, status)
	assert.Contains(t, out, "v0.1.2")
	paste("", "vault read kaizala/creds/acme")
	assert.Equal(t, 1, kaizala.Exchanges("asha"), "the access token lives on")

	paste("", blocks["**In an emergency**"])
	assert.Equal(t, 2, kaizala.Exchanges("asha"))
	secrets, err := v.Client.Logical().List("sys/leases/lookup/kaizala/creds/acme")
	require.NoError(t, err)
	assert.Nil(t, secrets, "every lease has ended")
}
