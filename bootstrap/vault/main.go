// Command vault is HashiCorp's Vault server and CLI, built from its Go module, so
// that a machine with only Go can run the engine. It is its own Go module, so the
// plugin does not depend on Vault itself.
package main

import (
	"os"

	"github.com/hashicorp/vault/command"
)

func main() { os.Exit(command.Run(os.Args[1:])) }
