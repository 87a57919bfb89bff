package backend

import (
	"bytes"
	"context"
	"fmt"
	"image"
	"image/color"
	"image/draw"
	"image/png"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// How the pages look in a real browser, on a phone and on a desktop, in light and dark. The browser starts once, which takes
// seconds, and shows all of them side by side, each in a frame with its own viewport. The pictures are written to the folder
// KAIZALA_SCREENSHOTS, so that people can check them.
func TestPagesInABrowser(t *testing.T) {
	t.Parallel()
	browser, err := exec.LookPath("chromium")
	if err != nil || testing.Short() {
		t.Log("LEFT OUT: the pages were not checked in a browser. That needs chromium in PATH, and a run without -short.")
		return
	}
	type frame struct {
		name string
		at   image.Rectangle
		dark bool
	}
	var frames []frame
	var html strings.Builder
	html.WriteString(`<!DOCTYPE html><style>body { margin: 0 } iframe { position: absolute; border: 0 }</style>`)
	work := t.TempDir()
	all := image.Rectangle{}
	for row, what := range []string{endConfirm, attemptGranted, attemptFailed} {
		end := pagesOf()[what]
		end.attempt.By = "oidc-ada.lovelace@example.com"
		require.NoError(t, os.WriteFile(filepath.Join(work, what+".html"), []byte(htmlOf(end)), 0o600))
		corner := image.Pt(0, row*844)
		for _, size := range []image.Point{{390, 844}, {1280, 800}} {
			for _, scheme := range []string{"light", "dark"} {
				f := frame{fmt.Sprintf("%s-%d,%d-%s", what, size.X, size.Y, scheme), image.Rectangle{corner, corner.Add(size)}, scheme == "dark"}
				frames = append(frames, f)
				fmt.Fprintf(&html, `<iframe src="%s.html" style="left: %dpx; top: %dpx; width: %dpx; height: %dpx; color-scheme: %s"></iframe>`,
					what, corner.X, corner.Y, size.X, size.Y, scheme)
				corner.X += size.X
				all = all.Union(f.at)
			}
		}
	}
	require.NoError(t, os.WriteFile(filepath.Join(work, "all.html"), []byte(html.String()), 0o600))
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, browser,
		"--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--user-data-dir="+t.TempDir(),
		fmt.Sprintf("--window-size=%d,%d", all.Dx(), all.Dy()), "--screenshot="+filepath.Join(work, "all.png"),
		"file://"+filepath.Join(work, "all.html")).CombinedOutput()
	require.NoError(t, err, string(out))
	shot, err := os.ReadFile(filepath.Join(work, "all.png"))
	require.NoError(t, err)
	picture, err := png.Decode(bytes.NewReader(shot))
	require.NoError(t, err)
	require.Equal(t, all, picture.Bounds())
	for _, f := range frames {
		page := image.NewRGBA(image.Rectangle{Max: f.at.Size()})
		draw.Draw(page, page.Rect, picture, f.at.Min, draw.Src)
		assert.Equal(t, f.dark, isDark(page.At(5, 5)), "the background of %s", f.name)
		assert.Greater(t, colors(page), 20, "%s is blank", f.name)
		if folder := os.Getenv("KAIZALA_SCREENSHOTS"); folder != "" {
			var file bytes.Buffer
			require.NoError(t, png.Encode(&file, page))
			require.NoError(t, os.WriteFile(filepath.Join(folder, f.name+".png"), file.Bytes(), 0o600))
		}
	}
}

func isDark(c color.Color) bool {
	r, g, b, _ := c.RGBA()
	return r+g+b < 3*0x8000
}

// colors counts the different colors of a picture.
func colors(picture *image.RGBA) int {
	seen := map[color.RGBA]bool{}
	for y := picture.Rect.Min.Y; y < picture.Rect.Max.Y; y += 2 {
		for x := picture.Rect.Min.X; x < picture.Rect.Max.X; x++ {
			seen[picture.RGBAAt(x, y)] = true
		}
	}
	return len(seen)
}
