package cniclient

import "encoding/json"

// Request is one call of the plugin: the variables that the CNI specification passes in the
// environment, and the configuration on standard input.
type Request struct {
	Command     string          `json:"command"`
	ContainerID string          `json:"containerID,omitempty"`
	Netns       string          `json:"netns,omitempty"`
	IfName      string          `json:"ifName,omitempty"`
	Args        string          `json:"args,omitempty"`
	Path        string          `json:"path,omitempty"`
	Config      json.RawMessage `json:"config"`
}

// Response is the answer to a Request: the output of the plugin, and whether it is an error
// of the CNI specification.
type Response struct {
	Failed bool            `json:"failed,omitempty"`
	Output json.RawMessage `json:"output,omitempty"` // nothing for commands without a result
}

// Versions returns the versions of the CNI specification that kedge supports.
func Versions() []string {
	return []string{"0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"}
}
