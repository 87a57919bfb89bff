// Command benchtable makes one table of the benchmarks' results: it reads the output
// of go test -bench and prints Markdown. A result that was measured several times is
// the median, with the least and the most. If the values are too far apart for a
// result, because the machine was busy, the table says so.
package main

import (
	"bufio"
	"fmt"
	"io"
	"log"
	"os"
	"slices"
	"strconv"
	"strings"
)

// A figure is printed only if the middle half of its values is within widest of their
// median. A ratio to the floor is printed only if its interval, and the ratio of the
// floor to itself, are within widestRatio: the engine must be within 3 % of the floor,
// and a wider interval could not show that.
const (
	widest      = 0.25
	widestRatio = 0.03
)

// results are the values of each unit of each benchmark, by its name without
// Benchmark and the number of processors.
type results map[string]map[string][]float64

func main() {
	measured, err := parse(os.Stdin)
	if err != nil {
		log.Fatal(err)
	}
	for _, line := range table(measured) {
		fmt.Println(line)
	}
}

func parse(r io.Reader) (results, error) {
	measured := results{}
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 4 || !strings.HasPrefix(fields[0], "Benchmark") {
			continue
		}
		name := strings.TrimPrefix(fields[0], "Benchmark")
		if at := strings.LastIndexByte(name, '-'); at > 0 {
			name = name[:at]
		}
		if measured[name] == nil {
			measured[name] = map[string][]float64{}
		}
		for pair := range slices.Chunk(fields[2:], 2) {
			value, err := strconv.ParseFloat(pair[0], 64)
			if err != nil || len(pair) < 2 {
				return nil, fmt.Errorf("not a benchmark's line: %s", lines.Text())
			}
			measured[name][pair[1]] = append(measured[name][pair[1]], value)
		}
	}
	return measured, lines.Err()
}

// rows are the in-process benchmarks in the table's order.
var rows = []struct{ name, what string }{
	{"CachedRead/creds", "read `creds`, cached"},
	{"CachedReadParallel", "read `creds`, cached, on all processors"},
	{"EmptyPath/creds", "the SDK's framework alone, same fields"},
	{"CachedRead/token", "read `token`, cached"},
	{"EmptyPath/token", "the SDK's framework alone, same fields"},
	{"ReadFromStorage", "read `creds` that has left memory"},
	{"ColdRead", "read `creds` with an exchange, against the emulator"},
	{"Renew", "renew a lease"},
	{"Revoke/one-of-many", "revoke one of a token's leases"},
	{"Revoke/last", "revoke the last one: a storage write"},
}

func table(measured results) []string {
	lines := []string{"| what | median | least … most | beside it |", "| --- | --- | --- | --- |"}
	row := func(what, median, spread, beside string) {
		lines = append(lines, fmt.Sprintf("| %s | %s | %s | %s |", what, median, spread, beside))
	}
	section := func(title string) { row("**"+title+"**", "", "", "") }

	section("in process")
	for _, r := range rows {
		if m := measured[r.name]; m != nil {
			figure, spread := summary(m["ns/op"], duration)
			beside := ""
			if allocs := m["allocs/op"]; allocs != nil {
				beside = fmt.Sprintf("%.0f allocations, %.0f B", median(allocs), median(m["B/op"]))
			}
			row(r.what, figure, spread, beside)
		}
	}
	var bytes []float64 // per tenant, for each number of tenants
	for _, size := range []string{"1000", "10000", "100000"} {
		for _, r := range []struct{ name, what string }{
			{"tick", "tick with nothing due, %s tenants"},
			{"index", "start and index of %s tenants"},
			{"list", "LIST of %s tenants"},
		} {
			m := measured["Tenants/"+size+"/"+r.name]
			if m == nil {
				continue
			}
			figure, spread := summary(m["ns/op"], duration)
			beside := ""
			if b := m["B/tenant"]; b != nil {
				bytes = append(bytes, median(b))
				least, most := slices.Min(b), slices.Max(b)
				beside = fmt.Sprintf("%.0f B a tenant in memory (%.0f … %.0f)", median(b), least, most)
			}
			row(fmt.Sprintf(r.what, size), figure, spread, beside)
		}
	}
	if len(bytes) == 3 {
		growth := (100_000*bytes[2] - 10_000*bytes[1]) / 90_000
		row("memory of 100000 idle tenants", mebibytes(100_000*bytes[2]), "", "")
		row("memory of a million, by the growth from 10000 to 100000", mebibytes(1_000_000*growth), "", fmt.Sprintf("%.0f B each", growth))
	}

	if m := measured["GoPlugin/creds"]; m != nil {
		section("over go-plugin, no Vault, 32 readers")
		compared(row, "`creds`", m)
		compared(row, "`token`", measured["GoPlugin/token"])
	}
	if m := measured["GoPluginIndex"]; m != nil {
		for _, r := range []struct {
			what, unit, format string
		}{
			{"first read of a mount of 100000 tenants", "ms/first-read", "%.1f ms"},
			{"its index", "s/index", "%.1f s"},
			{"what the plugin's process has grown by then, garbage included", "MiB/index", "%.0f MiB"},
			{"a LIST of it", "s/list", "%.2f s"},
			{"what the process has grown by then", "MiB/list", "%.0f MiB"},
		} {
			figure, spread := summary(m[r.unit], func(v float64) string { return fmt.Sprintf(r.format, v) })
			row(r.what, figure, spread, "")
		}
	}
	for _, storage := range []string{"inmem", "raft"} {
		if m := measured["Vault/"+storage+"/creds"]; m != nil {
			section("through Vault, " + storage + " storage, 32 connections")
			compared(row, "`creds`, beside a floor with leases", m)
			compared(row, "`token`, beside a floor without", measured["Vault/"+storage+"/token"])
			compared(row, "`creds` of an OAuth tenant, beside the floor with leases", measured["Vault/"+storage+"/oauth-creds"])
			compared(row, "`token` of an OAuth tenant, beside the floor without", measured["Vault/"+storage+"/oauth-token"])
			writes(row, "an exchange of an OAuth tenant (`refresh`), beside a write of Vault's kv", measured["Vault/"+storage+"/exchange"])
			writes(row, "`creds` with `token_per_lease`", measured["Vault/"+storage+"/token-per-lease"])
			if m := measured["Vault/"+storage+"/flooded"]; m != nil {
				wait := func(side string) string {
					return fmt.Sprintf("%.0f µs (99 %%: %.0f)", median(m[side+"-µs"]), median(m[side+"-99%-µs"]))
				}
				row(fmt.Sprintf("`token` for one reader, while %.0f unknown states a second come to `callback`", median(m["states/s"])),
					wait("flooded"), "", fmt.Sprintf("%s with as many reads of the floor; %s with nothing", wait("floored"), wait("quiet")))
			}
		}
	}
	return lines
}

// compared adds a row with the comparison of two sides.
func compared(row func(what, median, spread, beside string), what string, m map[string][]float64) {
	if m == nil {
		return
	}
	one := func(unit string) float64 { return median(m[unit]) }
	rate := fmt.Sprintf("%.0f reads/s", one("reads/s"))
	if one("fastest-reads/s")-one("slowest-reads/s") > 2*widest*one("reads/s") {
		rate = "too noisy"
	}
	ratio := fmt.Sprintf("%.3f ± %.3f of the floor", one("ratio"), one("±ratio"))
	off := max(one("noise")-1, 1-one("noise"))
	if max(one("±ratio"), one("±noise"), off) > widestRatio {
		ratio = "by total time too noisy for a ratio"
	}
	row(what, rate, fmt.Sprintf("%.0f … %.0f", one("slowest-reads/s"), one("fastest-reads/s")),
		fmt.Sprintf("%s; the floor beside itself %.3f ± %.3f; median rounds %.3f, and %.3f", ratio, one("noise"), one("±noise"), one("median-ratio"), one("median-noise")))
}

// writes adds a row for a request that writes to storage, which is slower and less even than a read. m has a ratio if the request
// was measured beside another one.
func writes(row func(what, median, spread, beside string), what string, m map[string][]float64) {
	if m == nil {
		return
	}
	beside := ""
	if m["ratio"] != nil {
		beside = fmt.Sprintf("%.2f ± %.2f of %.0f writes/s; kv beside itself %.2f ± %.2f",
			median(m["ratio"]), median(m["±ratio"]), median(m["floor-reads/s"]), median(m["noise"]), median(m["±noise"]))
	}
	row(what, fmt.Sprintf("%.0f/s", median(m["reads/s"])), fmt.Sprintf("%.0f … %.0f", median(m["slowest-reads/s"]), median(m["fastest-reads/s"])), beside)
}

// summary is the median as text, unless the values are too far apart, and the least
// and the most.
func summary(values []float64, text func(float64) string) (figure, spread string) {
	if len(values) == 0 {
		return "", ""
	}
	sorted := slices.Sorted(slices.Values(values))
	n := len(sorted)
	figure = text(median(sorted))
	if sorted[n-1-n/4]-sorted[n/4] > 2*widest*median(sorted) {
		figure = "too noisy"
	}
	if n > 1 {
		spread = text(sorted[0]) + " … " + text(sorted[n-1])
	}
	return figure, spread
}

func median(values []float64) float64 {
	if len(values) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(values))
	return (sorted[(len(sorted)-1)/2] + sorted[len(sorted)/2]) / 2
}

func duration(ns float64) string {
	switch {
	case ns < 1e3:
		return fmt.Sprintf("%.0f ns", ns)
	case ns < 1e6:
		return fmt.Sprintf("%.3g µs", ns/1e3)
	case ns < 1e9:
		return fmt.Sprintf("%.3g ms", ns/1e6)
	}
	return fmt.Sprintf("%.3g s", ns/1e9)
}

func mebibytes(bytes float64) string { return fmt.Sprintf("%.0f MiB", bytes/(1<<20)) }
