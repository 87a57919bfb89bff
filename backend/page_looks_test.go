package backend

import (
	"bytes"
	"context"
	"image"
	"image/color"
	"image/png"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// How the pages look in a real browser, on a phone and on a desk, in light and dark. The pictures are left in the folder that
// KAIZALA_SCREENSHOTS names, for people to look at.
func TestPagesInABrowser(t *testing.T) {
	browser, err := exec.LookPath("chromium")
	if err != nil || testing.Short() {
		t.Log("LEFT OUT: the pages were not looked at in a browser. That needs chromium in PATH, and a run without -short.")
		return
	}
	folder := os.Getenv("KAIZALA_SCREENSHOTS")
	if folder == "" {
		folder = t.TempDir()
	}
	for _, what := range []string{endConfirm, attemptGranted, attemptFailed} {
		end := pagesOf()[what]
		end.attempt.By = "oidc-ada.lovelace@example.com"
		file := filepath.Join(t.TempDir(), what+".html")
		require.NoError(t, os.WriteFile(file, []byte(htmlOf(end)), 0o600))
		for _, size := range []string{"390,844", "1280,800"} {
			for _, dark := range []bool{false, true} {
				name := filepath.Join(folder, what+"-"+size+map[bool]string{true: "-dark"}[dark]+".png")
				args := []string{
					"--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--user-data-dir=" + t.TempDir(),
					"--window-size=" + size, "--screenshot=" + name,
				}
				if dark {
					args = append(args, "--force-dark-mode", "--blink-settings=preferredColorScheme=0")
				}
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				out, err := exec.CommandContext(ctx, browser, append(args, "file://"+file)...).CombinedOutput()
				cancel()
				require.NoError(t, err, string(out))
				raw, err := os.ReadFile(name)
				require.NoError(t, err)
				picture, err := png.Decode(bytes.NewReader(raw))
				require.NoError(t, err)
				assert.Equal(t, dark, isDark(picture.At(5, 5)), "the background of %s", name)
				assert.Greater(t, colors(picture), 20, "%s is blank", name)
			}
		}
	}
}

func isDark(c color.Color) bool {
	r, g, b, _ := c.RGBA()
	return r+g+b < 3*0x8000
}

// colors counts the different colors of a picture.
func colors(picture image.Image) int {
	seen := map[color.Color]bool{}
	bounds := picture.Bounds()
	for y := bounds.Min.Y; y < bounds.Max.Y; y += 2 {
		for x := bounds.Min.X; x < bounds.Max.X; x++ {
			seen[picture.At(x, y)] = true
		}
	}
	return len(seen)
}
