terraform {
  required_version = ">= 1.10" # ephemeral variables

  required_providers {
    vault = {
      source  = "hashicorp/vault"
      version = ">= 4.5"
    }
  }
}
