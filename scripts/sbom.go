//go:build ignore

// Sbom writes down what a Go binary is made of, as a CycloneDX document: the
// modules that the linker has noted in the binary itself, so that nothing has to
// be looked up anywhere.
//
//	go run scripts/sbom.go BINARY VERSION DOCUMENT
package main

import (
	"debug/buildinfo"
	"encoding/json"
	"log"
	"os"
	"path"
	"strings"
)

type component struct {
	Type    string `json:"type"`
	Name    string `json:"name"`
	Version string `json:"version"`
	PURL    string `json:"purl"`
}

func module(kind, name, version string) component {
	return component{Type: kind, Name: name, Version: version, PURL: "pkg:golang/" + name + "@" + strings.ReplaceAll(version, "+", "%2B")}
}

func main() {
	log.SetFlags(0)
	if len(os.Args) != 4 {
		log.Fatal("usage: go run scripts/sbom.go BINARY VERSION DOCUMENT")
	}
	info, err := buildinfo.ReadFile(os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	main := module("application", info.Main.Path, os.Args[2])
	main.Name = path.Base(info.Main.Path)
	components := []component{module("library", "std", strings.TrimPrefix(info.GoVersion, "go"))}
	for _, dep := range info.Deps {
		if dep.Replace != nil {
			dep = dep.Replace
		}
		components = append(components, module("library", dep.Path, dep.Version))
	}
	text, err := json.MarshalIndent(map[string]any{
		"bomFormat":   "CycloneDX",
		"specVersion": "1.5",
		"version":     1,
		"metadata":    map[string]any{"component": main},
		"components":  components,
	}, "", "  ")
	if err != nil {
		log.Fatal(err)
	}
	if err := os.WriteFile(os.Args[3], append(text, '\n'), 0o644); err != nil {
		log.Fatal(err)
	}
}
