package objects

import (
	_ "embed" // for the definition
	"time"

	"k8s.io/apimachinery/pkg/runtime/schema"

	"kedge/server/customkinds"
)

//go:embed definition.yaml
var definition []byte

// kind is that of the objects.
var kind = customkinds.Kind{
	Definition: definition,
	Revision:   1,
	Resource:   schema.GroupVersionResource{Group: "kedge.io", Version: "v1", Resource: "snapshots"},
}

// Place is where a snapshot is.
type Place string

// The places.
const (
	OnServer Place = "Server"
	InS3     Place = "S3"
)

// Status is what is known of a snapshot. definition.yaml describes its fields for users.
type Status struct {
	Server     string `json:"server"`
	Place      Place  `json:"place"`
	File       string `json:"file"` // without the folder
	Bytes      int64  `json:"bytes"`
	Taken      string `json:"taken"` // RFC 3339, UTC
	Revision   int64  `json:"revision,omitempty"`
	Kedge      string `json:"kedge,omitempty"`
	Kubernetes string `json:"kubernetes,omitempty"`
	OpenedBy   string `json:"openedBy,omitempty"`
	Message    string `json:"message,omitempty"`
}

// timeText is a time as [Status] has it.
func timeText(t time.Time) string { return t.UTC().Truncate(time.Second).Format(time.RFC3339) }
