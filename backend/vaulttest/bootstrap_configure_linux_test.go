package vaulttest

import (
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/kaizala/kaizalatest"
)

// On a terminal, configure.sh asks for the settings, and does not show the secret
// that is typed.
func TestConfigureAsks(t *testing.T) {
	t.Parallel()
	v := Start(t)
	kaizala := kaizalatest.NewServer()
	t.Cleanup(kaizala.Close)
	id, secret := kaizala.RegisterConnector()

	keyboard, terminal := newTerminal(t)
	cmd, calls := configureRun(t, v)
	screen := &buffer{}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = terminal, terminal, terminal
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	require.NoError(t, cmd.Start())
	require.NoError(t, terminal.Close())
	read := make(chan struct{})
	go func() {
		defer close(read)
		chunk := make([]byte, 4096)
		for {
			n, err := keyboard.Read(chunk)
			_, _ = screen.Write(chunk[:n])
			if err != nil { // EIO: no process has the terminal open any more
				return
			}
		}
	}()
	for _, c := range []struct{ asked, typed string }{
		{"Mount path [kaizala]: ", ""},
		{"Tenants, separated by spaces []: ", "acme"},
		{"Connector ID (empty: its owner writes it) []: ", id},
		{"keep the one that is there): ", secret},
	} {
		Eventually(t, "configure.sh to ask: "+c.asked, func() bool { return strings.Contains(screen.String(), c.asked) })
		_, err := keyboard.WriteString(c.typed + "\n")
		require.NoError(t, err)
	}
	err := cmd.Wait()
	<-read
	require.NoError(t, err, screen)
	require.Empty(t, secretsIn(screen.String()+fileText(t, calls), secret))

	config, err := v.Client.Logical().Read("kaizala/config")
	require.NoError(t, err)
	require.Equal(t, id, config.Data["connector_id"])
	_, err = v.Client.Logical().Write("kaizala/config", map[string]any{"api_root": kaizala.URL})
	require.NoError(t, err)
	_, err = v.Client.Logical().Write("kaizala/tenants/acme", map[string]any{"refresh_token": kaizala.GenerateUserToken(id, "acme")})
	require.NoError(t, err, "the secret arrived as it was typed")
}

// newTerminal opens a pseudoterminal: the side of a person, and that of a program.
func newTerminal(t *testing.T) (person, program *os.File) {
	t.Helper()
	person, err := os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
	require.NoError(t, err)
	t.Cleanup(func() { _ = person.Close() })
	require.NoError(t, unix.IoctlSetPointerInt(int(person.Fd()), unix.TIOCSPTLCK, 0))
	n, err := unix.IoctlGetInt(int(person.Fd()), unix.TIOCGPTN)
	require.NoError(t, err)
	program, err = os.OpenFile("/dev/pts/"+strconv.Itoa(n), os.O_RDWR|syscall.O_NOCTTY, 0)
	require.NoError(t, err)
	return person, program
}
