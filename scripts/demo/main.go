// Demo writes the image archive of the application that `make run` runs: the probe of the end-to-end tests,
// which serves one line of text. It needs no registry.
package main

import (
	"flag"
	"fmt"
	"os"
	"runtime"

	"kedge/internal/test/image"
)

func main() {
	arch := flag.String("arch", runtime.GOARCH, "architecture of PROGRAM")
	flag.Parse()
	if flag.NArg() != 2 {
		fmt.Fprintln(os.Stderr, "usage: demo [-arch ARCH] PROGRAM ARCHIVE")
		os.Exit(2)
	}
	data, err := os.ReadFile(flag.Arg(0))
	if err == nil {
		err = image.WriteFile(flag.Arg(1), image.Docker, image.Image{
			Name:         "kedge.local/hello:1",
			Architecture: *arch,
			Files:        map[string]image.File{"/hello": {Data: data, Mode: 0o755}},
			Entrypoint:   []string{"/hello"},
			Cmd:          []string{"serve", ":8080", "Hello from kedge!"},
		})
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}
