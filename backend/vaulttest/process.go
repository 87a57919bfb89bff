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

// patience bounds every wait for something that has to happen; on an idle
// machine all of them end within two seconds or so.
const patience = 90 * time.Second

// groupScript runs a command and ends its whole process group when the command
// ends, or when this test process does: standard input is a pipe that only
// this process holds, so a test killed by its timeout leaves no server behind.
// SIGINT is what asks Vault to stop; go-plugin's processes ignore it too.
const groupScript = `
trap '' INT
exec 3<&0
"$@" </dev/null 3<&- &
child=$!
{ cat <&3 >/dev/null; kill -KILL 0; } &
wait "$child"
kill -KILL 0
`

// process is a command in a process group of its own.
type process struct {
	cmd   *exec.Cmd
	stdin io.WriteCloser
	done  chan struct{} // closed once the command has ended and was reaped
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

// interrupt asks for a graceful end and kills what is left after a while.
func (p *process) interrupt(wait time.Duration) {
	_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGINT)
	select {
	case <-p.done:
	case <-time.After(wait):
	}
	p.kill()
}

// kill ends the process group with SIGKILL and waits until nothing of it runs.
func (p *process) kill() {
	if p.ended() {
		return // and the group with it; its number may be another's by now
	}
	_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
	<-p.done
	// Plugins are the children of a child, which nobody here can wait for.
	poll(5*time.Second, func() bool { return !groupRuns(p.cmd.Process.Pid) })
}

// groupRuns tells whether any process of the group still runs. A zombie does
// not: in a container whose first process reaps nobody it stays for ever, and
// a signal still reaches it.
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
		// pid (name) state ppid pgrp …, where the name may hold anything.
		fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
		if len(fields) > 2 && fields[2] == strconv.Itoa(group) && fields[0] != "Z" && fields[0] != "X" {
			return true
		}
	}
	return false
}

// freePort finds a port on loopback that nobody listens on. It stays below the
// range that the kernel hands out for outgoing connections, so that a server
// that is killed finds its port free when it starts again.
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

// cleanEnv is the environment without Vault's variables: a developer's own
// VAULT_ADDR or VAULT_TOKEN must not reach a test's processes.
func cleanEnv(add ...string) []string {
	var env []string
	for _, kv := range os.Environ() {
		if !strings.HasPrefix(kv, "VAULT_") {
			env = append(env, kv)
		}
	}
	return append(env, add...)
}

// Eventually polls until cond holds, and ends the test after a minute and a
// half; what says what was waited for.
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
