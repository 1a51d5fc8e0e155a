package runtime

import "embed"

//go:embed payload/arm64
var payloadFiles embed.FS
