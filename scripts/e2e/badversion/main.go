// Badversion is a version of kedge that has a fault, for the tests of upgrades. Its executable ends with a line of JSON
// (Behaviour) that the test has appended. It prints its version and checks the machine as a good version does, by running
// the real kedge; as a node it has the fault.
//
// `make build-e2e` also packs it into a launcher, as a release with a fault is packed: build/e2e/badrelease. Its behaviour is in
// the file behaviourFile.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"syscall"
	"time"
)

// Behaviour is what this version does.
type Behaviour struct {
	Real       string `json:"real"`       // the path of a good kedge
	Version    string `json:"version"`    // that it prints
	Kubernetes string `json:"kubernetes"` // that it prints; empty for the real one
	DataFormat int    `json:"dataFormat"` // that it prints; 0 for the real one
	Refuses    string `json:"refuses"`    // what it finds wrong with the machine; empty for nothing
	// Fault is panic, hang, config (a permanent mistake), or convert (it changes the data and panics); empty for none.
	Fault string `json:"fault"`
	// DataDir is for convert.
	DataDir string `json:"dataDir"`
}

func main() {
	b, err := own()
	if err == nil {
		err = b.run(os.Args)
	}
	fmt.Fprintln(os.Stderr, "kedge:", err)
	os.Exit(1)
}

// behaviourFile has the behaviour of the packed program.
const behaviourFile = "/root/badrelease.json"

// own reads the behaviour.
func own() (b Behaviour, err error) {
	data, err := os.ReadFile("/proc/self/exe")
	if err == nil && !bytes.HasSuffix(data, []byte("}")) {
		data, err = os.ReadFile(behaviourFile)
	}
	if err != nil {
		return b, err
	}
	return b, json.Unmarshal(data[bytes.LastIndexByte(data, '\n')+1:], &b)
}

func (b Behaviour) run(args []string) error {
	command := ""
	if len(args) > 1 {
		command = args[1]
	}
	switch command {
	case "version":
		out, err := exec.Command(b.Real, "version").Output()
		if err != nil {
			return err
		}
		text := regexp.MustCompile(`^kedge \S+`).ReplaceAllString(string(out), "kedge "+b.Version)
		if b.Kubernetes != "" {
			text = regexp.MustCompile(`(?m)^Kubernetes .*$`).ReplaceAllString(text, "Kubernetes "+b.Kubernetes)
		}
		if b.DataFormat != 0 {
			text = regexp.MustCompile(`(?m)^data format .*$`).ReplaceAllString(text, fmt.Sprint("data format ", b.DataFormat))
		}
		fmt.Print(text)
		os.Exit(0)
	case "check":
		if b.Refuses != "" {
			fmt.Println("error    " + b.Refuses)
			os.Exit(1)
		}
	case "server", "agent":
		return b.node()
	}
	return syscall.Exec(b.Real, args, os.Environ())
}

// node has the fault.
func (b Behaviour) node() error {
	switch b.Fault {
	case "panic":
		panic("a fault of the new version")
	case "hang":
		for {
			time.Sleep(time.Hour)
		}
	case "config":
		fmt.Fprintln(os.Stderr, "kedge: a setting is not known any more")
		os.Exit(78)
	case "convert":
		description := filepath.Join(b.DataDir, "kedge.json")
		data, err := os.ReadFile(description)
		if err != nil {
			return err
		}
		data = bytes.Replace(data, []byte(`"format":1`), fmt.Appendf(nil, `"format":%d`, b.DataFormat), 1)
		if err := errors.Join(os.WriteFile(description, data, 0o644), os.RemoveAll(filepath.Join(b.DataDir, "server", "store", "member"))); err != nil {
			return err
		}
		panic("a fault of the new version after it has converted the data")
	case "":
		return syscall.Exec(b.Real, os.Args, os.Environ())
	}
	return fmt.Errorf("unknown fault %q", b.Fault)
}
