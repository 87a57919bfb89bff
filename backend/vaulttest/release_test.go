package vaulttest

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"gopkg.in/yaml.v3"
)

// releaseConfig is the part of .goreleaser.yaml that the test checks.
type releaseConfig struct {
	Builds []struct {
		Main, Binary        string
		Env, Flags, Ldflags []string
		Goos, Goarch        []string
		ModTimestamp        string `yaml:"mod_timestamp"`
	}
	Checksum struct {
		NameTemplate string `yaml:"name_template"`
		Algorithm    string
	}
	Archives []struct {
		Files []struct{ Src string }
	}
	Sboms   []struct{ Artifacts string }
	Release struct{ Disable bool }
}

func readReleaseConfig(t *testing.T, root string) (c releaseConfig) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(root, ".goreleaser.yaml"))
	require.NoError(t, err)
	require.NoError(t, yaml.Unmarshal(text, &c))
	require.Len(t, c.Builds, 1)
	require.Len(t, c.Archives, 1)
	return c
}

func TestReleaseConfig(t *testing.T) {
	root, err := Root()
	require.NoError(t, err)
	c := readReleaseConfig(t, root)
	build := c.Builds[0]
	assert.ElementsMatch(t, []string{"linux", "darwin", "windows"}, build.Goos)
	assert.ElementsMatch(t, []string{"amd64", "arm64"}, build.Goarch)
	assert.Equal(t, PluginName, build.Binary)
	assert.Equal(t, []string{"CGO_ENABLED=0"}, build.Env)
	assert.Equal(t, "{{ .CommitTimestamp }}", build.ModTimestamp)
	assert.Equal(t, "SHA256SUMS", c.Checksum.NameTemplate)
	assert.Equal(t, "sha256", c.Checksum.Algorithm)
	assert.NotEmpty(t, c.Sboms)
	assert.True(t, c.Release.Disable, "make release publishes nothing")
	for _, file := range c.Archives[0].Files {
		assert.FileExists(t, filepath.Join(root, file.Src))
	}

	goreleaser := filepath.Join(root, "bin", "goreleaser")
	if _, err := os.Stat(goreleaser); err != nil {
		t.Log("make release has not built GoReleaser here, so it does not check its configuration")
		return
	}
	cmd := exec.Command(goreleaser, "check")
	cmd.Dir = root
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
}

// Two builds of the same commit, in different directories, have the same bytes, and
// the binary reports its version.
func TestReleasedBinary(t *testing.T) {
	const version = "v0.7.0-rc.1"
	root, err := Root()
	require.NoError(t, err)
	build := readReleaseConfig(t, root).Builds[0]
	args := append([]string{"build"}, build.Flags...)
	for _, flag := range build.Ldflags {
		args = append(args, "-ldflags="+strings.ReplaceAll(flag, "v{{ .Version }}", version))
	}
	var (
		binaries []string
		sums     [][32]byte
	)
	for _, dir := range []string{t.TempDir(), filepath.Join(t.TempDir(), "another", "directory")} {
		for _, part := range []string{"backend", "cmd"} {
			require.NoError(t, os.CopyFS(filepath.Join(dir, part), os.DirFS(filepath.Join(root, part))))
		}
		for _, file := range []string{"go.mod", "go.sum"} {
			text, err := os.ReadFile(filepath.Join(root, file))
			require.NoError(t, err)
			require.NoError(t, os.WriteFile(filepath.Join(dir, file), text, 0o644))
		}
		binary := filepath.Join(dir, "dist", build.Binary)
		cmd := exec.Command("go", append(slices.Clone(args), "-o", binary, build.Main)...)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), build.Env...)
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "%s", out)
		content, err := os.ReadFile(binary)
		require.NoError(t, err)
		assert.False(t, bytes.Contains(content, []byte(dir)), "the binary has the path of its build directory")
		binaries = append(binaries, binary)
		sums = append(sums, sha256.Sum256(content))
	}
	assert.Equal(t, sums[0], sums[1], "both builds have the same checksum")
	require.Equal(t, version, PluginVersion(t, binaries[0]), "the linker sets the version")

	v := Start(t)
	v.Register(t, version, binaries[0])
	v.Mount(t, "kaizala")
	out, exit := v.CLI(t, v.RootToken, "plugin", "list", "-detailed", "secret")
	require.Zero(t, exit, out)
	require.Regexp(t, PluginName+` +secret +`+version+` `, out)
	out, exit = v.CLI(t, v.RootToken, "secrets", "list", "-detailed")
	require.Zero(t, exit, out)
	require.Regexp(t, `kaizala/ .* `+version+` `, out)

	// The archive has a software bill of materials.
	document := filepath.Join(t.TempDir(), "sbom.json")
	cmd := exec.Command("go", "run", filepath.Join(root, "scripts", "sbom.go"), binaries[0], version, document)
	text, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", text)
	var sbom struct {
		BOMFormat  string
		Metadata   struct{ Component struct{ Version string } }
		Components []struct{ Name, Version, PURL string }
	}
	text, err = os.ReadFile(document)
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(text, &sbom))
	assert.Equal(t, "CycloneDX", sbom.BOMFormat)
	assert.Equal(t, version, sbom.Metadata.Component.Version)
	names := map[string]bool{}
	for _, c := range sbom.Components {
		assert.Regexp(t, `^pkg:golang/`+c.Name+`@.+`, c.PURL)
		names[c.Name] = true
	}
	assert.True(t, names["std"] && names["github.com/hashicorp/vault/sdk"], "%v", names)
}
