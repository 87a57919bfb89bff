package vaulttest

import (
	"fmt"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
)

// Cluster is a Vault of several nodes on integrated storage. The nodes share a
// plugin directory, so that a plugin that is registered through one of them can
// run on all.
type Cluster struct {
	Nodes     []*Vault
	RootToken string

	down map[*Vault]bool
}

// StartCluster starts n nodes that are unsealed by one key, and waits until
// one node leads and the others follow. The options apply to every node; the
// storage is always raft.
func StartCluster(t testing.TB, n int, opts ...Option) *Cluster {
	t.Helper()
	c := &Cluster{down: map[*Vault]bool{}}
	first := launch(t, nodeOptions(opts, 0, nil)...)
	first.initialize(t)
	first.Unseal(t)
	c.Nodes = append(c.Nodes, first)
	c.RootToken = first.RootToken
	// A node votes, and can lead, once autopilot has found it stable, which
	// takes 10 seconds unless told otherwise.
	_, err := first.Client.Logical().Write("sys/storage/raft/autopilot/configuration", map[string]any{
		"server_stabilization_time": "1s",
	})
	require.NoError(t, err, "configuring autopilot")
	for i := 1; i < n; i++ {
		node := launch(t, nodeOptions(opts, i, first)...)
		node.UnsealKey = first.UnsealKey
		node.setRoot(first.RootToken)
		c.Nodes = append(c.Nodes, node)
	}
	for _, node := range c.Nodes[1:] {
		// A node accepts the key only after it has found the leader to join, and
		// then joins by itself. With the key twice it would start two elections,
		// and never step down.
		taken := false
		Eventually(t, "node "+node.Addr+" to join", func() bool {
			if !taken {
				_, err := node.Client.Sys().Unseal(first.UnsealKey)
				taken = err == nil
			}
			status, err := node.Client.Sys().SealStatus()
			return err == nil && !status.Sealed
		})
	}
	c.WaitForLeader(t)
	Eventually(t, fmt.Sprintf("all %d nodes to vote", n), func() bool { return c.voters() == n })
	return c
}

// voters counts the nodes that have a vote, running or not.
func (c *Cluster) voters() int {
	secret, err := c.Nodes[0].Client.Logical().Read("sys/storage/raft/configuration")
	if err != nil || secret == nil {
		return 0
	}
	config, _ := secret.Data["config"].(map[string]any)
	servers, _ := config["servers"].([]any)
	n := 0
	for _, server := range servers {
		if s, _ := server.(map[string]any); s["voter"] == true {
			n++
		}
	}
	return n
}

func nodeOptions(opts []Option, i int, first *Vault) []Option {
	return append(slices.Clone(opts), Raft(), func(o *options) {
		o.nodeID = fmt.Sprintf("node-%d", i)
		if first != nil {
			o.pluginDir = first.PluginDir
			o.join = []string{first.Addr}
		}
	})
}

// WaitForLeader waits until exactly one of the running nodes is active and all of
// them name it as their leader, and returns it.
func (c *Cluster) WaitForLeader(t testing.TB) *Vault {
	t.Helper()
	var leader *Vault
	Eventually(t, "one leader that all nodes agree on", func() bool {
		leader = nil
		for _, node := range c.running() {
			if !node.Active() {
				continue
			}
			if leader != nil {
				return false
			}
			leader = node
		}
		return leader != nil && c.agree(leader)
	})
	return leader
}

func (c *Cluster) agree(leader *Vault) bool {
	for _, node := range c.running() {
		resp, err := node.Client.Sys().Leader()
		if err != nil || resp.LeaderAddress != leader.Addr {
			return false
		}
	}
	return true
}

func (c *Cluster) running() []*Vault {
	return slices.DeleteFunc(slices.Clone(c.Nodes), func(v *Vault) bool { return c.down[v] })
}

// Leader returns the active node, and waits until there is one.
func (c *Cluster) Leader(t testing.TB) *Vault {
	t.Helper()
	return c.WaitForLeader(t)
}

// Kill ends a node and its plugins with SIGKILL.
func (c *Cluster) Kill(node *Vault) {
	node.Kill()
	c.down[node] = true
}

// RestartNode starts a killed node again, unseals it and waits until it is
// back in the cluster.
func (c *Cluster) RestartNode(t testing.TB, node *Vault) {
	t.Helper()
	node.StartAgain(t)
	delete(c.down, node)
	c.WaitForLeader(t)
}

// StepDown makes the leader give up its place and returns the next one, which
// is another node unless there is no other.
func (c *Cluster) StepDown(t testing.TB) *Vault {
	t.Helper()
	leader := c.Leader(t)
	require.NoError(t, leader.Client.Sys().StepDown())
	Eventually(t, leader.Addr+" to step down", func() bool { return !leader.Active() })
	return c.WaitForLeader(t)
}
