package nft

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// maxTableName is the kernel's limit for the name of a table, less the terminating zero.
const maxTableName = unix.NFT_NAME_MAXLEN - 1

// TableName returns the name of the table of one part of a node, as in "kedge-node1/pods".
// A node name has no slash, so the tables of different nodes cannot be confused.
func TableName(node, part string) string {
	name := tablePrefix(node) + part
	if len(name) <= maxTableName {
		return name
	}
	sum := sha256.Sum256([]byte(node))
	return anyTablePrefix + hex.EncodeToString(sum[:]) + "/" + part
}

// anyTablePrefix is the prefix of the names of all nodes' tables.
const anyTablePrefix = "kedge-"

func tablePrefix(node string) string { return anyTablePrefix + node + "/" }

// RemoveTables removes every table of a node, whatever its part.
func RemoveTables(node string) error {
	conn, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	tables, err := conn.ListTables()
	if err != nil {
		return fmt.Errorf("list nftables tables: %w", err)
	}
	prefix := strings.TrimSuffix(TableName(node, "x"), "x")
	for _, t := range tables {
		if strings.HasPrefix(t.Name, prefix) || strings.HasPrefix(t.Name, tablePrefix(node)) {
			conn.DelTable(t)
		}
	}
	if err := conn.Flush(); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove nftables tables of node %s: %w", node, err)
	}
	return nil
}
