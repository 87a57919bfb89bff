// Command vault is HashiCorp's Vault server and CLI, built from its own
// module so that a machine with no more than Go can try the engine on it. It
// is a module of its own: the plugin never depends on Vault itself.
package main

import (
	"os"

	"github.com/hashicorp/vault/command"
)

func main() { os.Exit(command.Run(os.Args[1:])) }
