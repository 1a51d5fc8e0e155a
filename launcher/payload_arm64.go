package main

import "embed"

//go:embed payload/arm64
var payloadFS embed.FS

const payloadDir = "payload/arm64"
