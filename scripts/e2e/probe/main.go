// Probe is the program in the test pods' image that speaks HTTP, TCP and UDP and
// uses resources on purpose. (The wget of Debian's static busybox crashes.)
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
)

const usage = `probe get URL [HEADER:VALUE CAFILE]   print the body; exit 22 on an HTTP error
probe post URL JSON [HEADER:VALUE CAFILE]
probe serve ADDR TEXT                 HTTP: "/" answers TEXT, "/addr" the caller's address, "/fail" an error
probe api ADDR GROUP CERT KEY         extension API server with the resource "callers" in GROUP/v1
probe echo tcp|udp ADDR               answer what comes, with the caller's address
probe send tcp|udp ADDR TEXT          send TEXT, print the answer
probe lookup host|srv|addr|cname|txt NAME...   print what each name has, sorted; "-" for no such name
probe eat MIB                         use memory
probe spin SECONDS                    use a processor
probe measure ADDR                    the other end of the following
probe whole ADDR BYTES                send an IPv4 packet that may not be divided
probe throw ADDR MIB                  send as fast as possible, print how fast
probe soak ADDR SECONDS               send and get back pieces of all sizes
`

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "probe:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) < 2 {
		return fmt.Errorf("usage:\n%s", usage)
	}
	switch args[0] {
	case "get":
		return request(http.MethodGet, args[1], "", args[2:])
	case "post":
		return request(http.MethodPost, args[1], args[2], args[3:])
	case "api":
		return serveAPI(args[1], args[2], args[3], args[4])
	case "serve":
		mux := http.NewServeMux()
		mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, args[2]) })
		mux.HandleFunc("/fail", func(w http.ResponseWriter, _ *http.Request) {
			http.Error(w, "as asked", http.StatusInternalServerError)
		})
		mux.HandleFunc("/addr", func(w http.ResponseWriter, r *http.Request) { fmt.Fprintln(w, r.RemoteAddr) })
		return http.ListenAndServe(args[1], mux)
	case "echo":
		return echo(args[1], args[2])
	case "send":
		return send(args[1], args[2], args[3])
	case "lookup":
		for _, name := range args[2:] {
			fmt.Println(name, lookup(args[1], name))
		}
		return nil
	case "eat":
		n, err := strconv.Atoi(args[1])
		if err != nil {
			return err
		}
		var hold [][]byte
		for range n {
			b := make([]byte, 1<<20)
			for i := range b {
				b[i] = 1
			}
			hold = append(hold, b)
		}
		fmt.Println("ate", len(hold))
		time.Sleep(time.Hour)
		return nil
	case "measure":
		return measure(args[1])
	case "whole", "throw", "soak":
		n, err := strconv.Atoi(args[2])
		if err != nil {
			return err
		}
		return map[string]func(string, int) error{"whole": whole, "throw": throw, "soak": soak}[args[0]](args[1], n)
	case "spin":
		n, err := strconv.Atoi(args[1])
		if err != nil {
			return err
		}
		for end := time.Now().Add(time.Duration(n) * time.Second); time.Now().Before(end); {
		}
		return nil
	}
	return fmt.Errorf("unknown command %q\n%s", args[0], usage)
}

func request(method, url, body string, more []string) error {
	req, err := http.NewRequest(method, url, strings.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	client := &http.Client{Timeout: 5 * time.Second}
	if len(more) == 2 {
		name, value, _ := strings.Cut(more[0], ":")
		req.Header.Set(name, value)
		pem, err := os.ReadFile(more[1])
		if err != nil {
			return err
		}
		pool := x509.NewCertPool()
		pool.AppendCertsFromPEM(pem)
		client.Transport = &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(os.Stdout, resp.Body); err != nil {
		return err
	}
	if resp.StatusCode >= 400 {
		fmt.Fprintln(os.Stderr, resp.Status)
		os.Exit(22)
	}
	return nil
}

func echo(network, addr string) error {
	if network == "udp" {
		c, err := net.ListenPacket("udp", addr)
		if err != nil {
			return err
		}
		buf := make([]byte, 2000)
		for {
			n, from, err := c.ReadFrom(buf)
			if err != nil {
				return err
			}
			if _, err := c.WriteTo(fmt.Appendf(nil, "%s from %s", buf[:n], from), from); err != nil {
				return err
			}
		}
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return err
	}
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			buf := make([]byte, 2000)
			n, err := c.Read(buf)
			if err == nil {
				fmt.Fprintf(c, "%s from %s", buf[:n], c.RemoteAddr())
			}
		}()
	}
}

func send(network, addr, text string) error {
	c, err := net.DialTimeout(network, addr, 3*time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(3 * time.Second)); err != nil {
		return err
	}
	if _, err := io.WriteString(c, text); err != nil {
		return err
	}
	buf := make([]byte, 2000)
	n, err := c.Read(buf)
	if err != nil {
		return err
	}
	fmt.Println(string(buf[:n]))
	return nil
}

// lookup asks as Go programs do: through resolv.conf with its search list.
func lookup(kind, name string) string {
	r := &net.Resolver{PreferGo: true}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	var found []string
	var err error
	switch kind {
	case "host":
		found, err = r.LookupHost(ctx, name)
	case "srv":
		var all []*net.SRV
		_, all, err = r.LookupSRV(ctx, "", "", name)
		for _, s := range all {
			found = append(found, fmt.Sprintf("%s:%d", s.Target, s.Port))
		}
	case "addr":
		found, err = r.LookupAddr(ctx, name)
	case "cname":
		var one string
		one, err = r.LookupCNAME(ctx, name)
		found = []string{one}
	case "txt":
		found, err = r.LookupTXT(ctx, name)
	}
	var failure *net.DNSError
	switch {
	case errors.As(err, &failure) && failure.IsNotFound:
		return "-"
	case err != nil:
		return err.Error()
	}
	slices.Sort(found)
	return strings.Join(found, " ")
}
