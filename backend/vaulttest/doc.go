// Package vaulttest runs the built plugin where it has to work: in a real
// Vault server, in a cluster of three, and behind go-plugin with no Vault at
// all. It is for tests; nothing that ships imports it.
//
// Every server is a process in a process group of its own, listens on
// loopback, keeps its files in the test's temporary directory and is gone
// when the test is. Helpers that take a testing.TB end the test when they
// fail, and say why.
package vaulttest
