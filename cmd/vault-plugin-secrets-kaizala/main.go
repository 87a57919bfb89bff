// Command vault-plugin-secrets-kaizala is the secrets engine as a plugin
// that Vault runs.
package main

import (
	"flag"
	"fmt"
	"io"
	"log"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/api"
	"github.com/hashicorp/vault/sdk/plugin"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend"
)

const name = "vault-plugin-secrets-kaizala"

// version is set at build time with -ldflags "-X main.version=v1.2.3". Vault
// accepts only a semantic version with a leading v, so this default has to be
// one as well.
var version = "v0.2.0"

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

func run(args []string, stdout, stderr io.Writer) int {
	// Vault passes the flags of its plugin API in the registered args.
	meta := api.PluginAPIClientMeta{}
	flags := meta.FlagSet()
	flags.Init(name, flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.Usage = func() { help(stderr) }
	printVersion := flags.Bool("version", false, "")
	if err := flags.Parse(args); err != nil {
		return 1
	}
	if *printVersion {
		fmt.Fprintln(stdout, version)
		return 0
	}
	if os.Getenv(plugin.HandshakeConfig.MagicCookieKey) != plugin.HandshakeConfig.MagicCookieValue {
		help(stderr)
		return 1
	}

	// The package net/http writes there what a service sends beside its answer, tokens too, and Vault would put that into its own log.
	log.SetOutput(io.Discard)

	logger := hclog.New(&hclog.LoggerOptions{
		// Vault drops lines below its own level.
		Level:      hclog.Trace,
		Output:     stderr,
		JSONFormat: true,
	})
	// A container's init program sends SIGTERM to Vault's whole process group, plugins included. Vault then stops in its own time, and takes
	// what services send meanwhile.
	terminated := make(chan os.Signal, 1)
	signal.Notify(terminated, syscall.SIGTERM)
	go func() {
		<-terminated
		backend.Stop()
		time.Sleep(100 * time.Millisecond) // the last answers leave
		os.Exit(128 + int(syscall.SIGTERM))
	}()
	err := plugin.ServeMultiplex(&plugin.ServeOpts{
		BackendFactoryFunc: backend.Factory(version),
		// A Vault before 1.12 has no AutoMTLS: the certificate comes in a wrapped
		// token. With AutoMTLS this is nil, and unused.
		TLSProviderFunc: api.VaultPluginTLSProvider(meta.GetTLSConfig()),
		Logger:          logger,
	})
	if err != nil {
		logger.Error("the plugin has ended", "error", err)
		return 1
	}
	return 0
}

func help(w io.Writer) {
	fmt.Fprintf(w, `%[1]s %[2]s: a secrets engine for HashiCorp Vault that
keeps refresh tokens, of OAuth 2.0 services and of Kaizala, and hands out access
tokens. Vault runs it; it does nothing when started by hand. Copy it to Vault's
plugin_directory, and then:

  vault plugin register -sha256="$(sha256sum %[1]s | cut -d' ' -f1)" -version=%[2]s secret %[1]s
  vault secrets enable -path=kaizala %[1]s
  vault path-help kaizala

-version prints the version and nothing else.
`, name, version)
}
