// Command visit is the browser and the app of scripts/demo-oauth.sh. With -user it opens an address, logs in with the
// password on standard input, allows what is asked for, and prints what a person reads on each page. Without, it asks the
// address as an app does, with the access token on standard input, and prints the answer.
//
//	visit -user asha URL < password
//	visit URL < access-token
package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/kaizala-vault/vault-plugin-secrets-kaizala/backend/vaulttest/browser"
)

func main() {
	user := flag.String("user", "", "who logs in")
	flag.Parse()
	if flag.NArg() != 1 {
		flag.Usage()
		os.Exit(2)
	}
	secret, err := io.ReadAll(os.Stdin)
	if err == nil {
		address, secret := flag.Arg(0), strings.TrimSpace(string(secret))
		if *user != "" {
			err = person(browser.Person{User: *user, Password: secret}, address)
		} else {
			err = app(secret, address)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func person(p browser.Person, address string) error {
	visit, err := p.Open(address)
	for _, page := range visit.Pages {
		fmt.Printf("[%s%s] %s\n", page.URL.Host, page.URL.Path, page.Text())
	}
	if err != nil {
		return err
	}
	if last := visit.Last(); last.Status >= http.StatusBadRequest {
		return fmt.Errorf("the last page has status %d", last.Status)
	}
	return nil
}

func app(token, address string) error {
	req, err := http.NewRequest(http.MethodGet, address, nil)
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+token)
	resp, err := (&http.Client{Timeout: 30 * time.Second}).Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return err
	}
	fmt.Println(strings.TrimSpace(string(body)))
	if resp.StatusCode != http.StatusOK {
		return errors.New(resp.Status)
	}
	return nil
}
