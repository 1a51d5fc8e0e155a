// Pack compresses the large program into the folder that the launcher embeds. The Makefile calls it; it is no
// part of the product.
package main

import (
	"fmt"
	"os"

	"github.com/klauspost/compress/zstd"

	"kedge/launcher/packedprogram"
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: pack PROGRAM DIR")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "pack:", err)
		os.Exit(1)
	}
}

func run(program, dir string) error {
	data, err := os.ReadFile(program)
	if err != nil {
		return err
	}
	_, err = packedprogram.Pack(dir, data, zstd.SpeedBetterCompression)
	return err
}
