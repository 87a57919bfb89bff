package vaulttest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// patience is the limit of every wait for an event; on an idle machine all waits
// end within about two seconds.
const patience = 90 * time.Second

// groupScript runs a command and ends its whole process group when the command
// ends, or when this test process ends: standard input is a pipe that only this
// process has, so a test that its timeout kills leaves no server behind. SIGINT
// and SIGTERM make Vault stop; go-plugin's processes ignore SIGINT.
const groupScript = `
trap '' INT TERM
exec 3<&0
"$@" </dev/null 3<&- &
child=$!
{ cat <&3 >/dev/null; kill -KILL 0; } &
wait "$child"
kill -KILL 0
`

// process is a command in its own process group.
type process struct {
	cmd   *exec.Cmd
	stdin io.WriteCloser
	done  chan struct{} // closed when the command has ended and was reaped
}

func startProcess(command, dir string, output *os.File, env []string, args ...string) (*process, error) {
	cmd := exec.Command("/bin/sh", append([]string{"-c", groupScript, "sh", command}, args...)...)
	cmd.Dir = dir
	cmd.Env = env
	cmd.Stdout = output
	cmd.Stderr = output
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p := &process{cmd: cmd, stdin: stdin, done: make(chan struct{})}
	go func() {
		_ = cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

func (p *process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// stop sends a signal to the process group, and kills the group if it still runs after wait.
func (p *process) stop(signal syscall.Signal, wait time.Duration) {
	_ = syscall.Kill(-p.cmd.Process.Pid, signal)
	select {
	case <-p.done:
	case <-time.After(wait):
	}
	p.kill()
}

// kill ends the process group with SIGKILL and waits until none of its processes runs.
func (p *process) kill() {
	if p.ended() {
		return // the group has ended too, and its number may be that of another group by now
	}
	_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
	<-p.done
	// Plugins are children of Vault, so this process cannot wait for them.
	poll(5*time.Second, func() bool { return !groupRuns(p.cmd.Process.Pid) })
}

// groupRuns returns whether any process of the group still runs. A zombie does not
// count: in a container whose first process reaps no children it stays for ever,
// and a signal can still be sent to it.
func groupRuns(group int) bool {
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil || stats == nil {
		return !errors.Is(syscall.Kill(-group, 0), syscall.ESRCH)
	}
	for _, path := range stats {
		stat, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		// pid (name) state ppid pgrp …: the name may have spaces and parentheses.
		fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
		if len(fields) > 2 && fields[2] == strconv.Itoa(group) && fields[0] != "Z" && fields[0] != "X" {
			return true
		}
	}
	return false
}

// freePort finds a free port on loopback. The port is below the range that the
// kernel uses for outgoing connections, so that it is free when a killed server
// starts again.
func freePort() (int, error) {
	for range 100 {
		port := 20000 + rand.IntN(12000)
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			continue
		}
		return port, l.Close()
	}
	return 0, errors.New("no free port between 20000 and 32000 on 127.0.0.1")
}

// cleanEnv is the environment without Vault's variables: a developer's VAULT_ADDR
// or VAULT_TOKEN must not reach the processes of a test.
func cleanEnv(add ...string) []string {
	var env []string
	for _, kv := range os.Environ() {
		if !strings.HasPrefix(kv, "VAULT_") {
			env = append(env, kv)
		}
	}
	return append(env, add...)
}

// Eventually polls until cond returns true, and ends the test after a minute and a
// half; what is the event, for the message.
func Eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	if !poll(patience, cond) {
		t.Fatalf("waited %s for %s", patience, what)
	}
}

func poll(limit time.Duration, cond func() bool) bool {
	for end := time.Now().Add(limit); ; time.Sleep(20 * time.Millisecond) {
		if cond() {
			return true
		}
		if time.Now().After(end) {
			return false
		}
	}
}
