// Package vaulttest runs the built plugin in a real Vault server, in a cluster
// of three, and behind go-plugin without a Vault. It is for tests; the plugin
// does not import it.
//
// Every server is a process in its own process group, listens on loopback,
// keeps its files in the test's temporary directory and ends with the test.
// Helpers that take a testing.TB end the test with the reason when they fail.
package vaulttest
