package cniclient

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"
)

// timeout is longer than the work of any request, and shorter than the runtime's timeout
// for the plugin.
const timeout = 60 * time.Second

// Codes of the CNI specification.
const (
	codeInvalidConfig = 7
	codeIO            = 5
	codeTryAgainLater = 11
)

// fault is an error as the CNI specification wants it printed.
type fault struct {
	CNIVersion string `json:"cniVersion"`
	Code       int    `json:"code"`
	Msg        string `json:"msg"`
	Details    string `json:"details,omitempty"`
}

func (f *fault) Error() string { return f.Msg + ": " + f.Details }

// conf is the part of the network configuration that the client understands.
type conf struct {
	CNIVersion string `json:"cniVersion"`
	Socket     string `json:"socket"`
}

// Main runs the plugin and returns its exit code.
func Main() int { return run(os.Getenv, os.Stdin, os.Stdout) }

func run(getenv func(string) string, stdin io.Reader, stdout io.Writer) int {
	var c conf
	out, err := call(getenv, stdin, &c)
	if err == nil {
		stdout.Write(out)
		return 0
	}
	var f *fault
	if !errors.As(err, &f) {
		stdout.Write(out) // the complete error of the kedge process
		return 1
	}
	f.CNIVersion = c.CNIVersion
	if f.CNIVersion == "" {
		f.CNIVersion = "1.0.0"
	}
	json.NewEncoder(stdout).Encode(f)
	return 1
}

// errAnswered means that the answer itself is an error.
var errAnswered = errors.New("kedge answered with an error")

func call(getenv func(string) string, stdin io.Reader, c *conf) ([]byte, error) {
	input, err := io.ReadAll(stdin)
	if err != nil {
		return nil, &fault{Code: codeIO, Msg: "read network configuration", Details: err.Error()}
	}
	if err := json.Unmarshal(input, c); err != nil {
		return nil, &fault{Code: codeInvalidConfig, Msg: "read network configuration", Details: err.Error()}
	}
	req := Request{
		Command:     getenv("CNI_COMMAND"),
		ContainerID: getenv("CNI_CONTAINERID"),
		Netns:       getenv("CNI_NETNS"),
		IfName:      getenv("CNI_IFNAME"),
		Args:        getenv("CNI_ARGS"),
		Path:        getenv("CNI_PATH"),
		Config:      input,
	}
	if req.Command == "VERSION" { // needs no running kedge
		return versions(c.CNIVersion), nil
	}
	if c.Socket == "" {
		return nil, &fault{Code: codeInvalidConfig, Msg: "network configuration has no socket",
			Details: "the file 10-kedge.conflist that kedge writes contains it"}
	}
	resp, err := Call(c.Socket, req)
	if err != nil {
		return nil, &fault{Code: codeTryAgainLater, Msg: "kedge does not answer; is it running?", Details: err.Error()}
	}
	if resp.Failed {
		return resp.Output, errAnswered
	}
	return resp.Output, nil
}

// Call sends one request to the kedge process that listens on socket.
func Call(socket string, req Request) (Response, error) {
	conn, err := net.DialTimeout("unix", socket, timeout)
	if err != nil {
		return Response{}, err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(timeout)); err != nil {
		return Response{}, err
	}
	if err := json.NewEncoder(conn).Encode(req); err != nil {
		return Response{}, fmt.Errorf("send request: %w", err)
	}
	var resp Response
	if err := json.NewDecoder(conn).Decode(&resp); err != nil {
		return Response{}, fmt.Errorf("read answer: %w", err)
	}
	return resp, nil
}

func versions(version string) []byte {
	if version == "" {
		version = "1.0.0"
	}
	out, err := json.Marshal(struct {
		CNIVersion string   `json:"cniVersion"`
		Supported  []string `json:"supportedVersions"`
	}{version, Versions()})
	if err != nil {
		panic(err) // strings always marshal
	}
	return out
}
