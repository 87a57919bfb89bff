// Command visit opens an address, logs in, allows what is asked for, and prints what a person reads on each page. It stands
// in for the browser where scripts/demo-oauth.sh shows a consent.
//
//	visit -user asha -password verysecure URL
package main

import (
	"flag"
	"fmt"
	"os"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/vaulttest/browser"
)

func main() {
	var person browser.Person
	flag.StringVar(&person.User, "user", "", "who logs in")
	flag.StringVar(&person.Password, "password", "", "the password")
	flag.Parse()
	if flag.NArg() != 1 {
		flag.Usage()
		os.Exit(2)
	}
	visit, err := person.Open(flag.Arg(0))
	for _, page := range visit.Pages {
		fmt.Printf("[%s%s] %s\n", page.URL.Host, page.URL.Path, page.Text())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	if last := visit.Last(); last.Status >= 400 {
		fmt.Fprintf(os.Stderr, "the last page has status %d\n", last.Status)
		os.Exit(1)
	}
}
