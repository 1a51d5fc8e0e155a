package runtime

import "embed"

//go:embed payload/amd64
var payloadFiles embed.FS
