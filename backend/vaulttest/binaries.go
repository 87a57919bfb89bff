package vaulttest

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// PluginName is the name under which the engine is registered, and the name
// of its binary.
const PluginName = "vault-plugin-secrets-kaizala"

// Versions that [OldestVaultBinary] and [VaultBinary] build; the scripts use the
// same two.
const (
	PinnedVault = "1.21.0"
	OldestVault = "1.19.0"
)

// Binaries are found or built once for a test process.
var (
	pluginOnce = sync.OnceValues(buildSharedPlugin)
	pinnedOnce = sync.OnceValues(func() (string, error) { return vaultScript(PinnedVault) })
	oldestOnce = sync.OnceValues(func() (string, error) { return vaultScript(OldestVault) })
)

// PluginBinary is the path of the built plugin: $KAIZALA_PLUGIN_BIN if it is set,
// as in make test, and otherwise one that is built from this tree.
func PluginBinary(t testing.TB) string { return found(t, pluginOnce) }

// VaultBinary is the path of the Vault to test with: $VAULT_BIN if it is set, and
// otherwise the pinned one, which is built if it is missing; that takes minutes.
func VaultBinary(t testing.TB) string { return found(t, pinnedOnce) }

// OldestVaultBinary is the path of the oldest Vault that the engine supports, which
// is built if it is missing; that takes minutes. $VAULT_OLDEST_BIN overrides it.
func OldestVaultBinary(t testing.TB) string { return found(t, oldestOnce) }

func found(t testing.TB, get func() (string, error)) string {
	t.Helper()
	path, err := get()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// BuildPlugin builds the plugin with this version, such as "v0.0.9", into the
// test's temporary directory, and returns its path.
func BuildPlugin(t testing.TB, version string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), PluginName)
	if err := buildPlugin(path, "-ldflags=-X main.version="+version); err != nil {
		t.Fatal(err)
	}
	return path
}

// PluginVersion asks a built plugin for its version.
func PluginVersion(t testing.TB, binary string) string {
	t.Helper()
	cmd := exec.Command(binary, "-version")
	cmd.Env = cleanEnv()
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s -version: %v", binary, err)
	}
	return strings.TrimSpace(string(out))
}

func buildSharedPlugin() (string, error) {
	if path := os.Getenv("KAIZALA_PLUGIN_BIN"); path != "" {
		if _, err := os.Stat(path); err != nil {
			return "", fmt.Errorf("KAIZALA_PLUGIN_BIN: %w", err)
		}
		return filepath.Abs(path)
	}
	root, err := Root()
	if err != nil {
		return "", err
	}
	// Test processes of several packages may build at the same time: each builds
	// under its own name, and the rename is atomic.
	path := filepath.Join(root, "bin", "test", PluginName)
	tmp := fmt.Sprintf("%s.%d", path, os.Getpid())
	defer os.Remove(tmp)
	if err := buildPlugin(tmp); err != nil {
		return "", err
	}
	return path, os.Rename(tmp, path)
}

func buildPlugin(path string, flags ...string) error {
	root, err := Root()
	if err != nil {
		return err
	}
	args := append([]string{"build", "-o", path}, flags...)
	cmd := exec.Command("go", append(args, "./cmd/"+PluginName)...)
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("building the plugin: %w\n%s", err, out)
	}
	return nil
}

func vaultScript(version string) (string, error) {
	root, err := Root()
	if err != nil {
		return "", err
	}
	var stderr bytes.Buffer
	cmd := exec.Command(filepath.Join(root, "scripts", "vault.sh"), version)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("scripts/vault.sh %s: %w\n%s", version, err, stderr.String())
	}
	return strings.TrimSpace(string(out)), nil
}

// Root is the directory of this module's go.mod, which is searched from the working
// directory upwards. It is an error to run a test from outside the tree.
func Root() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "scripts", "vault.sh")); err == nil {
			return dir, nil
		} else if !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			return "", errors.New("no scripts/vault.sh in any parent directory: run the tests inside the repository")
		}
		dir = parent
	}
}
