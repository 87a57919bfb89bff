package tokenservice

import (
	"os"
	"testing"

	"go.uber.org/goleak"
)

// environmentProxy is the proxy in the tests' environment, an address without a server. Go reads the environment once.
const environmentProxy = "http://127.0.0.1:1"

func TestMain(m *testing.M) {
	for _, name := range []string{"HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy"} {
		_ = os.Setenv(name, environmentProxy)
	}
	_, _ = os.Unsetenv("NO_PROXY"), os.Unsetenv("no_proxy")
	goleak.VerifyTestMain(m)
}
