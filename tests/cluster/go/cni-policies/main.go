// A CNI plugin, chained after the one that gives a pod its address: it tells the address to the enforcer of network
// policies and waits until its rules are in place, so that no container of the pod runs before them.
package main

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"strings"
	"time"
)

const version = "0.4.0"

type configuration struct {
	Socket     string          `json:"socket"`
	PrevResult json.RawMessage `json:"prevResult"`
}

type result struct {
	IPs []struct {
		Address string `json:"address"`
	} `json:"ips"`
}

func main() {
	if err := run(os.Getenv("CNI_COMMAND")); err != nil {
		_ = json.NewEncoder(os.Stdout).Encode(map[string]any{"cniVersion": version, "code": 100, "msg": err.Error()})
		os.Exit(1)
	}
}

func run(command string) error {
	if command == "VERSION" {
		return json.NewEncoder(os.Stdout).Encode(map[string]any{
			"cniVersion": version, "supportedVersions": []string{"0.3.1", version},
		})
	}
	var given configuration
	if err := json.NewDecoder(os.Stdin).Decode(&given); err != nil {
		return fmt.Errorf("the configuration cannot be read: %w", err)
	}
	message := map[string]string{"command": command}
	for _, pair := range strings.Split(os.Getenv("CNI_ARGS"), ";") {
		if name, value, found := strings.Cut(pair, "="); found {
			message[name] = value
		}
	}
	if command == "ADD" {
		var before result
		if err := json.Unmarshal(given.PrevResult, &before); err != nil || len(before.IPs) == 0 {
			return fmt.Errorf("no plugin before this one gave an address")
		}
		message["address"], _, _ = strings.Cut(before.IPs[0].Address, "/")
	}
	if err := tell(given.Socket, message); err != nil && command == "ADD" {
		return err
	}
	if command == "ADD" {
		_, err := os.Stdout.Write(given.PrevResult)
		return err
	}
	return nil
}

func tell(socket string, message map[string]string) error {
	connection, err := net.DialTimeout("unix", socket, 5*time.Second)
	if err != nil {
		return fmt.Errorf("the enforcer of network policies does not listen: %w", err)
	}
	defer connection.Close()
	_ = connection.SetDeadline(time.Now().Add(20 * time.Second))
	if err := json.NewEncoder(connection).Encode(message); err != nil {
		return err
	}
	var answer struct {
		Error string `json:"error"`
	}
	if err := json.NewDecoder(connection).Decode(&answer); err != nil {
		return fmt.Errorf("no answer of the enforcer of network policies: %w", err)
	}
	if answer.Error != "" {
		return fmt.Errorf("%s", answer.Error)
	}
	return nil
}
