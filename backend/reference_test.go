package backend

import (
	"cmp"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/sdk/framework"
	"github.com/hashicorp/vault/sdk/logical"
	"github.com/stretchr/testify/assert"
)

func TestGeneratedReference(t *testing.T) {
	text := reference(newEngine(t).Backend)
	assert.Empty(t, regexp.MustCompile("(?m)^\\| `\\w+` \\| +\\|.*|^.*``.*|^.*\\n.*--- \\|\\n\\n").FindAllString(text, -1),
		"a field without a type, an empty default, a table without rows")
	isCurrent(t, "reference.md", text)
}

// reference is the text of reference.md, made from the engine's own descriptions of its paths.
func reference(b *framework.Backend) string {
	var out strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&out, format+"\n", args...) }
	line("<!-- Generated from the engine's own definitions by make generate: do not edit. -->\n")
	line("# Paths and fields\n\n%s\n", paragraph(b.Help))
	line("Paths are relative to the mount, `kaizala/` in most examples. `vault path-help kaizala/creds/acme` shows")
	line("in a terminal what a path is for and what it takes. A *duration* is a text such as `90s`, `15m` or `24h`, or a number of seconds.")
	shown := map[string]string{} // the heading under which each table is
	table := func(path, title, head string, rows []string) {
		text := head + "\n" + strings.Join(rows, "\n")
		if at, found := shown[text]; found && len(rows) > 3 {
			line("\n%s the same as under `%s`.", title, at)
			return
		}
		shown[text] = path
		line("\n%s:\n\n%s", title, text)
	}
	paths := slices.SortedFunc(slices.Values(b.Paths), func(x, y *framework.Path) int {
		return cmp.Compare(readable(x), readable(y))
	})
	for _, path := range paths {
		name := readable(path)
		line("\n## `%s`\n\n%s\n\n%s\n", name, path.HelpSynopsis, paragraph(path.HelpDescription))
		line("| operation | HTTP | capability in a policy | |\n| --- | --- | --- | --- |")
		for _, kind := range operations {
			if op, found := path.Operations[kind.operation]; found {
				p, capabilities := op.Properties(), kind.capability
				if path.Operations[logical.CreateOperation] != nil && kind.operation == logical.UpdateOperation {
					capabilities = "create`, `update"
				}
				line("| %s | `%s` | `%s` | %s %s |", kind.name, kind.method, capabilities, p.Summary, p.Description)
			}
		}
		if fields := parameters(path); len(fields) > 0 {
			var rows []string
			for _, name := range slices.Sorted(maps.Keys(fields)) {
				field := fields[name]
				rows = append(rows, fmt.Sprintf("| `%s` | %s | %s | %s |", name, typeName(field), byDefault(field), field.Description))
			}
			table(name, "Takes", "| field | type | default | |\n| --- | --- | --- | --- |", rows)
		}
		for _, kind := range operations {
			op, found := path.Operations[kind.operation]
			if !found {
				continue
			}
			for _, response := range op.Properties().Responses[200] {
				var rows []string
				for _, name := range slices.Sorted(maps.Keys(response.Fields)) {
					rows = append(rows, fmt.Sprintf("| `%s` | %s | %s |", name, typeName(response.Fields[name]), response.Fields[name].Description))
				}
				if len(rows) > 0 {
					table(name, "A "+kind.name+" answers", "| field | type | |\n| --- | --- | --- |", rows)
				}
			}
		}
	}
	return out.String()
}

// operations are the operations of a path in the order in which they are shown. A
// create is documented with the update, which has the same fields.
var operations = []struct {
	operation                logical.Operation
	name, method, capability string
}{
	{logical.ReadOperation, "read", "GET", "read"},
	{logical.ListOperation, "list", "LIST", "list"},
	{logical.UpdateOperation, "write", "POST", "update"},
	{logical.PatchOperation, "patch", "PATCH", "patch"},
	{logical.DeleteOperation, "delete", "DELETE", "delete"},
}

var parameter = regexp.MustCompile(`\(\?P<(\w+)>`)

// readable is a path's pattern as documentation writes it: creds/:tenant.
func readable(path *framework.Path) string {
	name := strings.TrimSuffix(path.Pattern, "/?$")
	for _, found := range parameter.FindAllStringSubmatch(name, -1) {
		name = strings.ReplaceAll(name, framework.GenericNameRegex(found[1]), ":"+found[1])
	}
	return name
}

// parameters are the fields that a request may name outside its path.
func parameters(path *framework.Path) map[string]*framework.FieldSchema {
	fields := maps.Clone(path.Fields)
	for _, found := range parameter.FindAllStringSubmatch(path.Pattern, -1) {
		delete(fields, found[1])
	}
	return fields
}

func typeName(field *framework.FieldSchema) string {
	name := map[framework.FieldType]string{
		framework.TypeString:           "string",
		framework.TypeBool:             "bool",
		framework.TypeInt:              "int",
		framework.TypeInt64:            "int",
		framework.TypeDurationSecond:   "duration",
		framework.TypeCommaStringSlice: "list",
		framework.TypeStringSlice:      "list",
		framework.TypeMap:              "map",
		framework.TypeKVPairs:          "map",
		framework.TypeTime:             "time",
	}[field.Type]
	if len(field.AllowedValues) > 0 {
		var values []string
		for _, value := range field.AllowedValues {
			values = append(values, fmt.Sprintf("`%v`", value))
		}
		name = strings.Join(values, ", ")
	}
	if isSecret(field) {
		name += ", secret"
	}
	return name
}

func byDefault(field *framework.FieldSchema) string {
	switch value := field.Default.(type) {
	case nil:
		return ""
	case []string:
		return "`" + strings.Join(value, ",") + "`"
	case int:
		if field.Type == framework.TypeDurationSecond {
			return "`" + shortest(time.Duration(value)*time.Second) + "`"
		}
	}
	return fmt.Sprintf("`%v`", field.Default)
}

// shortest is a duration without its zeros: 15m, 1h, and 0 for none.
func shortest(d time.Duration) string {
	if d == 0 {
		return "0"
	}
	return strings.Replace(strings.Replace(d.String(), "m0s", "m", 1), "h0m", "h", 1)
}

var placeholder = regexp.MustCompile(`<(\w+)>`)

// paragraph removes the line breaks that are for a terminal, and escapes what
// Markdown would take for HTML.
func paragraph(text string) string {
	return placeholder.ReplaceAllString(strings.Join(strings.Fields(text), " "), ":$1")
}
